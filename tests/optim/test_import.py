import subprocess
import sys

CODE = """
import sys, torch
before = set(sys.modules)
import muonlab
print([name for name in set(sys.modules) - before if not name.startswith('muonlab')])
"""


def test_import_muonlab_loads_nothing_beyond_torch():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
