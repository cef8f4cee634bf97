"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const titles = { updates: "updates", tokens: "tokens", seconds: "training seconds, without evaluation and compilation" };
const plots = Object.entries(figures).map(([id, figure]) => {
  const place = document.getElementById(id);
  Plotly.newPlot(place, figure.data, figure.layout, config);
  return place;
});
const controls = document.getElementById("controls");

const search = document.getElementById("search");

function filter() {
  const shown = new Set([...controls.querySelectorAll("[type=checkbox]:checked")].map((box) => box.value));
  const words = search ? search.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
  const visible = (group, cell) =>
    (group === undefined || shown.has(group)) && (cell === undefined || words.every((word) => cell.toLowerCase().includes(word)));
  for (const plot of plots) Plotly.restyle(plot, { visible: plot.data.map((trace) => visible(trace.meta.group, trace.meta.cell)) });
  for (const element of document.querySelectorAll("[data-group]")) element.hidden = !visible(element.dataset.group, element.dataset.cell);
}

function axis(name) {
  for (const plot of plots) {
    if (!plot.data.some((trace) => trace.meta.x)) continue;
    Plotly.update(plot, { x: plot.data.map((trace) => trace.meta.x[name]) }, { "xaxis.title.text": titles[name], "xaxis.autorange": true });
  }
}

controls.addEventListener("change", (event) => (event.target.type === "radio" ? axis(event.target.value) : filter()));
let pause;
if (search) search.addEventListener("input", () => (clearTimeout(pause), (pause = setTimeout(filter, 200))));

function key(row, column) {
  const text = row.cells[column].dataset.sort || row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return [Number.isNaN(number) ? Infinity : number, text];
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a, head.cellIndex), key(b, head.cellIndex)];
      return x[0] !== y[0] ? x[0] - y[0] : x[1].localeCompare(y[1]);
    });
    table.tBodies[0].append(...(rising ? rows : rows.reverse()));
  });
}
