// What a reader may do with the page: sort its tables, walk through their cells, read a cell's numbers, choose a metric.
// Nothing is said here alone: without it, and printed, the page has every number.
"use strict";
const make = (tag, set) => Object.assign(document.createElement(tag), set);

// --- what is told of a cell, beside it; Escape takes it away
const tip = document.body.appendChild(make("div", { id: "tip", hidden: true }));
tip.setAttribute("role", "tooltip");

let told = null;

function tell(cell) {
  hide();
  told = cell;
  tip.textContent = cell.dataset.told;
  tip.hidden = false;
  cell.setAttribute("aria-describedby", tip.id);
  place();
}

function place() {
  if (!told) return;
  tip.style.left = "0"; // its width is measured where nothing bounds it
  const at = told.getBoundingClientRect(), own = tip.getBoundingClientRect(), gap = 6;
  const below = at.bottom + gap + own.height < innerHeight;
  tip.style.top = `${below ? at.bottom + gap : Math.max(gap, at.top - gap - own.height)}px`;
  tip.style.left = `${Math.max(gap, Math.min(at.left, document.documentElement.clientWidth - own.width - gap))}px`;
}

function hide() {
  told?.removeAttribute("aria-describedby");
  told = null;
  tip.hidden = true;
}

for (const cell of document.querySelectorAll("td[title]")) {
  cell.dataset.told = cell.title; // a browser's own title is for the mouse alone
  cell.removeAttribute("title");
  for (const event of ["mouseenter", "focus"]) cell.addEventListener(event, () => tell(cell));
  for (const event of ["mouseleave", "blur"]) cell.addEventListener(event, hide);
}
addEventListener("keydown", (event) => event.key === "Escape" && hide());
addEventListener("scroll", place, { capture: true, passive: true });

// --- a table: a button over each column sorts, arrow keys move from cell to cell (one stop for Tab: ARIA's grid)
function key(row, column) {
  const cell = row.cells[column], text = cell.textContent.trim();
  const number = parseFloat(cell.dataset.value ?? text.replace("−", "-"));
  return column === 0 || cell.classList.contains("text") ? text : Number.isNaN(number) ? null : number;
}

function sort(table, original, header) {
  const column = header.cellIndex, words = original.every((row) => typeof key(row, column) === "string");
  const order = words ? ["ascending", "descending", null] : ["descending", "ascending", null];
  const next = order[(order.indexOf(header.getAttribute("aria-sort")) + 1) % 3];
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  const sign = next === "descending" ? -1 : 1;
  const sorted = [...original];
  if (next) {
    header.setAttribute("aria-sort", next);
    sorted.sort((one, two) => {
      const a = key(one, column), b = key(two, column);
      if (a === null || b === null) return (a === null) - (b === null); // what has no number stays last
      return sign * (words ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    });
  }
  table.tBodies[0].append(...sorted);
}

for (const table of document.querySelectorAll("table")) {
  const original = [...table.tBodies[0].rows];
  for (const header of table.tHead.rows[0].cells) {
    const button = make("button", { type: "button", title: "sort" });
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(table, original, header));
    header.append(button);
  }
  const stop = (cell) => cell?.querySelector("button") ?? cell;
  for (const cell of table.querySelectorAll("th, td")) stop(cell).tabIndex = -1;
  stop(table.tHead.rows[0].cells[0]).tabIndex = 0;
  table.setAttribute("role", "grid");
  table.parentElement.removeAttribute("tabindex"); // its cells scroll it
  table.addEventListener("focusin", (event) => {
    table.querySelector("[tabindex='0']").tabIndex = -1;
    event.target.tabIndex = 0;
  });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("th, td"), row = cell.parentElement, rows = [...table.rows];
    const last = row.cells.length - 1, at = cell.cellIndex;
    const to = {
      ArrowRight: [row, at + 1], ArrowLeft: [row, at - 1], Home: [row, 0], End: [row, last],
      ArrowDown: [rows[rows.indexOf(row) + 1], at], ArrowUp: [rows[rows.indexOf(row) - 1], at],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    stop(to[0]?.cells[to[1]])?.focus();
  });
}

// --- one metric of many
const choose = document.querySelector(".choose"), select = choose.querySelector("select");
const metrics = [...document.getElementById("metrics").children];
const show = () => metrics.forEach((metric, i) => (metric.hidden = i !== select.selectedIndex));
choose.hidden = false;
select.addEventListener("change", show);
show(); // a browser may have kept a choice over a reload

// --- paper shows what is folded
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
