// Tables that sort and filter, figures that enlarge, contents that follow.
"use strict";
(() => {
  // ---- sorting ----

  // The number that a cell begins with; "<0.001" counts as half of it, as it is smaller. NaN for a text.
  function leadingNumber(text) {
    const found = /^([<>]?)\s*([+-]?)(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?/i.exec(text.replaceAll("\u2212", "-"));
    if (!found) return NaN;
    const value = Number(found[2] + found[3].replaceAll(",", "") + (found[4] ?? ""));
    return found[1] ? value / 2 : value;
  }

  function sortKey(cell, numeric) {
    const text = cell ? cell.textContent.trim() : "";
    const value = cell && cell.dataset.value !== undefined ? Number(cell.dataset.value || NaN) : leadingNumber(text);
    return { text, empty: text === "", value: numeric ? value : NaN };
  }

  // Numbers before texts; what is empty is last in both directions.
  function compare(first, second, direction) {
    if (first.empty || second.empty) return first.empty - second.empty;
    const numbers = !Number.isNaN(first.value) - !Number.isNaN(second.value);
    if (numbers) return -numbers;
    if (!Number.isNaN(first.value)) return direction * (first.value - second.value);
    return direction * first.text.localeCompare(second.text, "en", { numeric: true, sensitivity: "base" });
  }

  // Cohorts keep the order in which they came, unless the sort is by cohort.
  function sortTable(table, column, direction, together) {
    const body = table.tBodies[0];
    const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
    const places = new Map();
    const rows = [...body.rows].map((row) => {
      const cohort = together && column > 0 ? row.cells[0].textContent : "";
      if (!places.has(cohort)) places.set(cohort, places.size);
      return { row, group: places.get(cohort), key: sortKey(row.cells[column], numeric) };
    });
    rows.sort((a, b) => a.group - b.group || compare(a.key, b.key, direction));
    body.append(...rows.map(({ row }) => row));
    separate(table, together);
  }

  function separate(table, together) {
    let last = null;
    for (const row of table.tBodies[0].rows) {
      const cohort = row.cells[0].textContent;
      row.classList.toggle("apart", together && last !== null && cohort !== last && !row.hidden);
      if (!row.hidden) last = cohort;
    }
  }

  function makeSortable(table) {
    const headers = [...table.tHead.rows[0].cells];
    const box = table.closest("details")?.querySelector(".together");
    const together = () => "grouped" in table.dataset && (box?.checked ?? true);
    headers.forEach((header, column) => {
      header.querySelector("button")?.addEventListener("click", () => {
        const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        for (const other of headers) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        header.setAttribute("aria-sort", direction);
        sortTable(table, column, direction === "ascending" ? 1 : -1, together());
      });
    });
    box?.addEventListener("change", () => {
      const column = headers.findIndex((header) => /ascending|descending/.test(header.getAttribute("aria-sort") ?? ""));
      if (column < 0) separate(table, together());
      else sortTable(table, column, headers[column].getAttribute("aria-sort") === "ascending" ? 1 : -1, together());
    });
    separate(table, together());
    makeFilter(table, () => separate(table, together()));
    stick(table);
  }

  function makeFilter(table, changed) {
    const field = table.closest("details")?.querySelector(".filter");
    if (!field) return;
    const count = table.closest("details").querySelector(".count");
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = words.length ? `${shown} of ${table.tBodies[0].rows.length} rows` : "";
      changed();
    });
  }

  // The columns that name the row stay in sight while the others scroll.
  function stick(table) {
    const leading = Number(table.dataset.leading ?? 1);
    for (const row of table.rows) {
      for (let column = 0; column < leading; column += 1) {
        row.cells[column]?.classList.add("sticks", ...(column === leading - 1 ? ["last"] : []));
      }
    }
    if (leading < 2) return;
    const measure = () => {
      let left = 0;
      for (let column = 0; column < leading; column += 1) {
        for (const row of table.rows) row.cells[column]?.style.setProperty("--left", `${left}px`);
        left += table.tHead.rows[0].cells[column].getBoundingClientRect().width;
      }
    };
    new ResizeObserver(measure).observe(table);
  }

  for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);

  // ---- figures ----

  const dialog = document.getElementById("enlarged");
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      const picture = button.querySelector("img").cloneNode();
      picture.loading = "eager";
      dialog.querySelector(".picture").replaceChildren(picture);
      dialog.querySelector("p").textContent = button.parentElement.querySelector("figcaption").textContent;
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("close", () => dialog.querySelector(".picture").replaceChildren());

  // ---- command ----

  document.getElementById("copy")?.addEventListener("click", async (event) => {
    const code = document.getElementById("command");
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // a browser that refuses still lets the reader copy what is selected
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });

  // ---- contents ----

  const contents = document.querySelector("nav.contents > details");
  const narrow = matchMedia("(max-width: 62rem)");
  const fold = () => (contents.open = !narrow.matches);
  narrow.addEventListener("change", fold);
  fold();
  contents.addEventListener("click", (event) => {
    if (narrow.matches && event.target.closest("a")) contents.open = false;
  });
  const links = new Map([...contents.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const link = links.get(entry.target.id);
        if (entry.isIntersecting) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  for (const section of document.querySelectorAll("main > section")) seen.observe(section);

  // ---- paper has no folds ----

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("main details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
