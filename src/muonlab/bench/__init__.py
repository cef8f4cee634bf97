"""How fast: one optimizer step, one training update, and where its time goes, beside every peer that is installed.

step            `optimizer.step()` of ours and others on named sets of matrices, with the physical floor
train           whole updates: tokens per second, utilisation, forward, backward and optimizer
profile         the kernels of one update, and the gaps between them
session         everything on one machine in one command
peers, plain    what it is compared with
machine, floor  what the hardware could do
rows            one failure costs one row
"""
