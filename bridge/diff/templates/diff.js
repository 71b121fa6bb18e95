// The table of layers and the strips above it. Rows are drawn as they are scrolled to; all text goes in as text.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { texts, columns, figures, levels, pairs } = data;
  const count = columns.name.length;
  const table = document.querySelector(".layers"), body = table.tBodies[0], box = table.parentElement;
  const root = table.dataset.root;
  const [search, pairOf, sortBy, only, found] = ["search", "pair", "sort", "only", "found"].map((id) => document.getElementById(id));
  const CHUNK = 60, LEVELS = ".012345678x";
  const diverging = new Set(data.diverging);
  const several = pairs.length > 1;

  const text = (column, i) => texts[columns[column][i]];
  const pairIndex = new Int32Array(count);
  pairs.forEach(([, , start, end], p) => pairIndex.fill(p, start, end));
  const between = (i) => `${pairs[pairIndex[i]][0]} → ${pairs[pairIndex[i]][1]}`;
  const LEFT = Number(table.dataset.left);
  const number = (value) => value === null ? "–" : value === 0 ? "0"
    : value.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
  const whole = (value) => value.toLocaleString("en");

  // Long names may go on in the next line after a dot or a slash, as people read them.
  const breakable = (name) => name.split(/(?<=\w[./_])/).flatMap((part, at) => at ? [document.createElement("wbr"), part] : [part]);

  function element(tag, css, ...children) {
    const made = document.createElement(tag);
    if (css) made.className = css;
    made.append(...children);
    return made;
  }

  // --- the order ---------------------------------------------------------------------------------------------------

  // Texts are compared once, not at every step of a sort.
  let ranks = null;
  function rank(column, i) {
    if (!ranks) {
      const collator = new Intl.Collator("en", { numeric: true });
      ranks = new Int32Array(texts.length);
      texts.map((_, t) => t).sort((a, b) => collator.compare(texts[a], texts[b])).forEach((t, place) => { ranks[t] = place; });
    }
    return columns[column][i] === 0 ? null : ranks[columns[column][i]];  // text 0 is empty
  }
  const size = (i) => text("shape", i) === "" ? 1 : text("shape", i).split(" × ").reduce((all, dim) => all * dim, 1);
  // What is no longer finite is the worst; then, of a reference of zeros, whatever is not zero; then the figure.
  const error = (name) => [
    (i) => levels[name][i] === "." ? null : figures[`${name}_lost`][i] || 0,
    (i) => figures[name][i] ?? (levels[name][i] === "0" ? 0 : Infinity),
  ];
  const place = new Map(data.ranking.map((i, at) => [i, at]));
  const keys = {
    blame: [[(i) => place.has(i) ? -place.get(i) : -1e9, ...error("introduced")], true],
    index: [[(i) => i], false],
    name: [[(i) => rank("name", i)], false],
    operator: [[(i) => rank("operator", i)], false],
    module: [[(i) => rank("module", i), (i) => rank("source", i)], false],
    pair: [[(i) => pairIndex[i]], false],
    precision: [[(i) => rank("precision", i), size], false],
    introduced: [error("introduced"), true],
    carried: [error("carried"), true],
    largest: [[(i) => figures.largest[i]], true],
  };
  let key = "blame", falling = true, rows = [], drawn = 0, waiting = 0;

  function order() {
    clearTimeout(waiting);
    waiting = 0;
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const p = pairOf.value === "" ? -1 : Number(pairOf.value);
    rows = [];
    for (let i = 0; i < count; i++) {
      if ((p < 0 || pairIndex[i] === p) && (!only.checked || diverging.has(i)) && fits(i, wanted)) rows.push(i);
    }
    const sign = falling ? -1 : 1;
    const values = keys[key][0].map((value) => rows.map(value));
    const by = rows.map((_, at) => at).sort((a, b) => {
      for (const column of values) {
        const x = column[a], y = column[b];
        if (x === y) continue;
        if (x === null) return 1;  // what is not known comes last, whichever way
        if (y === null) return -1;
        return sign * (x < y ? -1 : 1);
      }
      return rows[a] - rows[b];
    });
    rows = by.map((at) => rows[at]);
    found.textContent = rows.length === count ? `${whole(count)} layer${count === 1 ? "" : "s"}` : `${whole(rows.length)} of ${whole(count)} layers`;
    body.replaceChildren();
    drawn = 0;
    box.scrollTop = 0;
    more();
  }

  let lower = null;
  function fits(i, wanted) {
    if (!wanted.length) return true;
    lower ??= texts.map((item) => item.toLowerCase());
    return wanted.every((word) => ["name", "operator", "module", "source", "precision", "tensor"].some((column) => lower[columns[column][i]].includes(word)));
  }

  function sort(name, way) {
    key = name;
    falling = way;
    for (const head of table.tHead.rows[0].cells) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    sortBy.value = key;
    order();
  }

  // --- rows --------------------------------------------------------------------------------------------------------

  function cell(label, css, ...children) {
    const made = element("td", css, ...children);
    made.dataset.label = label;
    made.setAttribute("role", "cell");
    return made;
  }

  function figure(label, name, i) {
    const level = levels[name][i], lost = figures[`${name}_lost`][i];
    const swatch = element("span", `swatch heat-${level}`);
    swatch.setAttribute("aria-hidden", "true");
    const made = cell(label, "figure", ...(level === "." ? ["–"] : [swatch, number(figures[name][i])]));
    if (lost) made.append(element("span", "lost", `${whole(lost)} not finite`));
    return made;
  }

  function row(i) {
    const made = element("tr", diverging.has(i) ? "diverges" : "");
    const opener = element("button", "", element("code", "", ...breakable(text("name", i))));
    opener.type = "button";
    opener.setAttribute("aria-expanded", "false");
    const head = element("th", "", opener);
    head.scope = "row";
    head.setAttribute("role", "rowheader");
    if (i === data.first) head.append(" ", element("span", "flag", "first to diverge"));
    else if (diverging.has(i)) head.append(" ", element("span", "flag", "diverges"));
    const source = text("source", i), shape = text("shape", i);
    made.append(
      cell("#", "figure", String(i - pairs[pairIndex[i]][2] + 1)), head, cell("Operator", "", text("operator", i)),
      cell("From", "from", element("code", "", ...breakable(text("module", i))), " ",
        element("code", "detail", ...breakable(source.startsWith(root) ? source.slice(root.length) : source))),
      cell("Between", "", between(i)),
      cell("Type, shape", "", text("precision", i), " ", element("span", "detail", shape)),
      figure("Introduced", "introduced", i), figure("Carried", "carried", i),
      cell("Largest value", "figure", number(figures.largest[i])));
    made.setAttribute("role", "row");
    made.dataset.index = i;
    return made;
  }

  function more(upTo = drawn + CHUNK) {
    const part = document.createDocumentFragment();
    for (const end = Math.min(upTo, rows.length); drawn < end; drawn++) part.append(row(rows[drawn]));
    body.append(part);
  }

  function toggle(made, open) {
    const opener = made.querySelector("button");
    if ((opener.getAttribute("aria-expanded") === "true") === open) return;
    opener.setAttribute("aria-expanded", String(open));
    if (!open) return made.nextElementSibling.remove();
    const i = Number(made.dataset.index), list = element("dl");
    const facts = [
      ["Tensor", text("tensor", i)], ["Module", text("module", i)], ["Source", text("source", i)],
      ["Shape", text("shape", i)],
      ["Introduced, largest absolute", number(figures.introduced_max[i])],
      ["Carried, largest absolute", number(figures.carried_max[i])], ["Note", text("note", i)],
    ];
    for (const [name, value] of facts) if (value !== "") list.append(element("dt", "", name), element("dd", "", value));
    const wide = element("td", "", list);
    wide.colSpan = table.tHead.rows[0].cells.length;
    made.after(element("tr", "more", wide));
  }

  function show(i) {
    if (waiting) order();  // what was just typed, which would take the row away again
    if (!rows.includes(i)) {
      search.value = "";
      pairOf.value = "";
      only.checked = false;
      order();
    }
    const at = rows.indexOf(i);
    if (at >= drawn) more(at + CHUNK);
    const made = body.querySelector(`tr[data-index="${i}"]`);
    toggle(made, true);
    made.scrollIntoView({ block: "center" });
    made.querySelector("button").focus({ preventScroll: true });
  }

  // --- the strips --------------------------------------------------------------------------------------------------

  function strip(picture) {
    const [, , start, end] = pairs[picture.dataset.pair];
    const handle = picture.querySelector(".handle"), cursor = picture.querySelector(".cursor");
    const chosen = picture.querySelector(".chosen"), length = end - start;
    let at = data.first !== null && data.first >= start && data.first < end ? data.first - start : 0;
    const words = (i) => `${whole(i - start + 1)}: ${text("operator", i)} ${text("name", i)}`;
    const errors = (i) => ["introduced", "carried"].map((name) => {
      const level = levels[name][i], lost = figures[`${name}_lost`][i];
      return `${name} ${level === "." ? "not measured" : number(figures[name][i])}${lost ? `, ${whole(lost)} not finite` : ""}`;
    }).join("; ");

    function choose(to) {
      at = Math.max(0, Math.min(length - 1, to));
      const i = start + at, x = LEFT + (at + 0.5) / length * 1000;
      cursor.setAttribute("transform", `translate(${x} 0)`);
      cursor.setAttribute("visibility", "visible");
      const from = [text("module", i), text("source", i)].filter(Boolean).join(", ");
      const act = element("button", "act", "Show in the table");
      act.type = "button";
      act.addEventListener("click", () => show(i));
      chosen.replaceChildren(element("strong", "", words(i)), from ? ` (${from})` : "", `: ${errors(i)} `, act);
      chosen.hidden = false;
      handle.setAttribute("aria-valuenow", String(at + 1));
      handle.setAttribute("aria-valuetext", `${words(i)}; ${errors(i)}`);
    }
    // On a small screen the picture is wider than what is seen of it: what diverges first is in the middle.
    const seen = picture.querySelector(".scroll"), mark = picture.querySelector("path.first");
    if (mark) seen.scrollLeft = (LEFT + (at + 0.5) / length * 1000) / Number(picture.querySelector(".bands").viewBox.baseVal.width) * seen.scrollWidth - seen.clientWidth / 2;

    // Under one unit of the picture lie several layers: the worst of them is meant.
    function under(event) {
      const place = handle.getBoundingClientRect(), share = (event.clientX - place.left) / place.width;
      const reach = Math.max(0, Math.floor(length / place.width));
      const middle = Math.max(0, Math.min(length - 1, Math.floor(share * length)));
      let best = middle;
      for (let j = Math.max(0, middle - reach); j <= Math.min(length - 1, middle + reach); j++) {
        const worse = LEVELS.indexOf(levels.introduced[start + j]) - LEVELS.indexOf(levels.introduced[start + best]);
        if (worse > 0) best = j;
      }
      return best;
    }
    handle.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") choose(under(event)); });
    handle.addEventListener("click", (event) => {
      choose(under(event));
      if (event.pointerType === "mouse") show(start + at);
    });
    handle.addEventListener("focus", () => choose(at));
    const leap = Math.max(1, Math.round(length / 20));
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: leap, PageDown: -leap, Home: -length, End: length };
    handle.addEventListener("keydown", (event) => {
      if (event.key in moves) choose(at + moves[event.key]);
      else if (event.key === "Enter" || event.key === " ") show(start + at);
      else return;
      event.preventDefault();
    });
    handle.hidden = false;
  }

  // --- the controls ------------------------------------------------------------------------------------------------

  table.setAttribute("role", "table");
  for (const part of [table.tHead, body]) part.setAttribute("role", "rowgroup");
  table.tHead.rows[0].setAttribute("role", "row");
  for (const head of table.tHead.rows[0].cells) {
    const name = head.dataset.key, label = head.textContent;
    const button = element("button", "", label);
    button.type = "button";
    button.addEventListener("click", () => sort(name, key === name ? !falling : keys[name][1]));
    head.setAttribute("role", "columnheader");
    head.replaceChildren(button);
    const option = element("option", "", label === "#" ? "the graph's order" : label.toLowerCase());
    option.value = name;
    sortBy.append(option);
  }
  pairOf.parentElement.hidden = !several;
  only.parentElement.hidden = !diverging.size;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(order, 80);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && search.value) {
      search.value = "";
      order();
    } else if (event.key === "ArrowDown") {
      body.querySelector("button")?.focus();
      event.preventDefault();
    }
  });
  pairOf.addEventListener("change", order);
  only.addEventListener("change", order);
  sortBy.addEventListener("change", () => sort(sortBy.value, keys[sortBy.value][1]));
  body.addEventListener("click", (event) => {
    const opener = event.target.closest("button");
    if (opener) toggle(opener.closest("tr"), opener.getAttribute("aria-expanded") !== "true");
  });
  body.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const all = [...body.querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const next = all[at + (event.key === "ArrowDown" ? 1 : -1)];
    (next || (event.key === "ArrowUp" ? search : null))?.focus();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    search.focus();
    event.preventDefault();
  });
  const near = () => {
    if (drawn < rows.length && box.scrollTop + box.clientHeight > box.scrollHeight - 600) more();
  };
  box.addEventListener("scroll", near, { passive: true });
  box.addEventListener("focusin", near);

  document.querySelectorAll(".strip").forEach(strip);
  document.querySelector(".controls").hidden = false;
  sort("blame", true);
  addEventListener("beforeprint", () => {
    if (drawn < rows.length) found.textContent = `The first ${whole(drawn)} of ${whole(rows.length)} layers; all are in diff.json.`;
  });
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
