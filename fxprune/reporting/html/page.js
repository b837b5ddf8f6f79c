(() => {
  "use strict";

  // Tables: every entry is a <tbody>, whose first row holds the values; what belongs to it moves along.
  const valueOf = (body, column) => {
    const cell = body.rows[0].cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  const order = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  const sortBy = (header) => {
    const table = header.closest("table");
    const rising = header.getAttribute("aria-sort") !== "ascending";
    const bodies = [...table.tBodies].sort(
      (a, b) => (rising ? 1 : -1) * order(valueOf(a, header.cellIndex), valueOf(b, header.cellIndex)),
    );
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", rising ? "ascending" : "descending");
    table.append(...bodies);
  };
  for (const header of document.querySelectorAll("table.sortable > thead > tr > th")) {
    header.querySelector("button").addEventListener("click", () => sortBy(header));
  }

  // Entries that open: without this script, all of them are open.
  const toggles = [...document.querySelectorAll(".toggle")];
  const set = (toggle, open) => {
    toggle.setAttribute("aria-expanded", String(open));
    document.getElementById(toggle.getAttribute("aria-controls")).hidden = !open;
  };
  const isOpen = (toggle) => toggle.getAttribute("aria-expanded") === "true";
  for (const toggle of toggles) {
    set(toggle, false);
    toggle.addEventListener("click", () => set(toggle, !isOpen(toggle)));
  }
  for (const all of document.querySelectorAll(".all")) {
    all.hidden = false;
    all.addEventListener("click", () => {
      const open = !toggles.every(isOpen);
      toggles.forEach((toggle) => set(toggle, open));
      all.textContent = open ? "close all" : "open all";
    });
  }
})();
