"use strict";
/* The page of `metricfold report` and `metricfold view`. Its data come packed (see payload.py): within the
   page, or again and again from the server that served it. What is in them is written as text, never as HTML. */
(() => {
const LIVE = document.documentElement.dataset.live;  // where to ask for newer data
const SHORT = 50;  // curves of fewer logs are not smoothed
const RECENT = 50;  // so many logs are "now"
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 5], [5, 2, 1, 2, 1, 2], [1, 5], [12, 3, 5, 3]];
const RANGE_ALL = null;

const state = {
  runs: [], panels: [], range: RANGE_ALL, full: [0, 1], smooth: null, log: false, outliers: false, others: true,
  hidden: new Set(), enlarged: new Set(), cursor: null, dark: false, paused: false, filter: "", focused: 0,
};
let cards = [];

// -- Small things ------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const named = (text) => el("bdi", { text });
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const whole = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 });

/** A value as a reader wants it: five digits, thousands apart, and what is not finite by its name. */
function shown(value) {
  if (value == null) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size >= 1e15) text = value.toExponential(3);
  else if (size >= 1e9) text = trimmed((value / 1e9).toPrecision(5)) + " G";
  else if (size >= 1e7) text = trimmed((value / 1e6).toPrecision(5)) + " M";
  else if (size >= 1e3) text = value.toLocaleString("en-US", { maximumSignificantDigits: 5 });
  else if (size < 1e-3) text = trimmedExponent(value.toExponential(3));
  else text = trimmed(value.toPrecision(5));
  return text.replace("-", "−");
}
const trimmed = (text) => text.includes(".") ? text.replace(/\.?0+$/, "") : text;
const trimmedExponent = (text) => text.replace(/\.?0*e/, "e").replace("e-", "e−").replace("e+", "e");

/** A difference, whose sign is said and whose last digits are noise. */
const difference = (value) => value == null || !Number.isFinite(value) ? "–" : (value > 0 ? "+" : "") + shown(+value.toPrecision(3));

function tick(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  const [by, unit] = size >= 1e15 ? [1, ""] : size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : size >= 1e4 ? [1e3, "k"] : [1, ""];
  const text = size >= 1e15 || size < 1e-3 ? trimmedExponent(value.toExponential(2)) : String(+(value / by).toPrecision(6)) + unit;
  return text.replace(/^-/, "−");
}

/** A time as everybody reads it: 2026-11-29 11:28, where the reader is. */
const moment = (time) => new Date(time * 1000).toLocaleString("sv-SE", { dateStyle: "short", timeStyle: "short" });

let colours = {};
function colour(name) {
  return colours[name] ??= getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

// -- The data ----------------------------------------------------------------------------------------------

async function embedded() {
  const text = $("data").textContent;
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** The payload with functions in place of references: a block is read when it is first asked for. */
function decoded(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const payload = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const start = 4 + length;
  const known = new Map();
  const read = ([kind, offset, count, first]) => {
    if (known.has(offset + kind)) return known.get(offset + kind);
    const at = start + offset;
    let made;
    if (kind === "b") made = new Uint8Array(buffer, at, count);
    else if (kind === "d") made = new Float64Array(buffer.slice(at, at + 8 * count));
    else if (kind === "f") made = new Float32Array(joined(new Uint8Array(buffer, at, 4 * count), count).buffer);
    else {
      const gaps = new Uint32Array(joined(new Uint8Array(buffer, at, 4 * (count - 1)), count - 1).buffer);
      made = new Float64Array(count);
      made[0] = first;
      for (let i = 1; i < count; i++) made[i] = made[i - 1] + gaps[i - 1];
    }
    known.set(offset + kind, made);
    return made;
  };
  for (const run of payload.runs)
    for (const part of [...run.columns, ...run.columns.flatMap((c) => [c.means, c.last]), ...run.maps, ...run.heats])
      if (part)
        for (const name of ["x", "y", "shares", "holes"])
          if (part[name]) {
            const where = part[name];
            Object.defineProperty(part, name, { get: () => read(where) });
          }
  return payload;
}

/** Four planes of bytes as the numbers that they were. */
function joined(planes, count) {
  const bytes = new Uint8Array(4 * count);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0, from = plane * count; i < count; i++) bytes[4 * i + plane] = planes[from + i];
  return bytes;
}

/** The place of the last of ascending `steps` that is not after `step`, or -1. */
function lastUpTo(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1; else high = middle;
  }
  return low - 1;
}

/** The exponential mean that a curve has seen, without the pull of its start; begun anew behind a gap. */
function smoothed(values, keep) {
  const out = new Float64Array(values.length);
  let sum = 0, weight = 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (!Number.isFinite(value)) { out[i] = NaN; sum = weight = 0; continue; }
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    out[i] = sum / weight;
  }
  return out;
}

function smoothCurve(column) {
  if (!(state.smooth > 0) || column.count < SHORT || !fluctuates(column)) return null;
  if (column.smoothFor !== state.smooth) {
    const { x, y, length } = column.means ?? { x: column.x, y: column.y, length: 1 };
    column.smooth = { x, y: smoothed(y, state.smooth ** length) };
    column.smoothFor = state.smooth;
  }
  return column.smooth;
}

/** Whether a curve goes up and down; a schedule or a running total would only lag behind itself. */
function fluctuates(column) {
  if (column.turns === undefined) {
    const { y } = column;
    let turns = 0, way = 0;
    for (let i = 1; i < y.length; i++) {
      const now = Math.sign(y[i] - y[i - 1]);
      if (now && way && now !== way) turns++;
      if (now) way = now;
    }
    column.turns = turns / y.length;
  }
  return column.turns > 0.03;
}

function bestOf(column) {
  if (!column.better) return null;
  if (column.best === undefined) {
    let at = -1;
    const { y } = column, lower = column.better === "lower";
    for (let i = 0; i < y.length; i++)
      if (Number.isFinite(y[i]) && (at < 0 || (lower ? y[i] < y[at] : y[i] > y[at]))) at = i;
    column.best = at < 0 ? null : { value: y[at], step: column.x[at] };
  }
  return column.best;
}

/** The mean of the last finite values, and how many these are. */
function recent(column) {
  const { y } = column.last ?? column;
  const values = [];
  for (let i = y.length - 1; i >= 0 && values.length < RECENT; i--) if (Number.isFinite(y[i])) values.push(y[i]);
  return { mean: values.reduce((a, b) => a + b, 0) / values.length, logs: values.length };
}

// -- What is shown: panels of curves, maps and distributions -----------------------------------------------

const byStatistic = ["", "mean", "p50", "p95", "p99"];
const isLoss = (name) => name === "loss" || name.endsWith("_loss");
const isValidation = (prefix) => /^(val|valid|validation|eval|evaluation|dev|test)/i.test(prefix);

function modelled(payload) {
  state.runs = payload.runs;
  const datasets = new Map();
  const panels = new Map();
  let low = Infinity, high = -Infinity;
  for (const [r, run] of payload.runs.entries()) {
    run.letter = payload.runs.length > 1 ? letter(r) : "";
    for (const column of run.columns) {
      if (column.dataset && !datasets.has(column.dataset)) datasets.set(column.dataset, datasets.size);
      low = Math.min(low, column.x[0]);
      high = Math.max(high, column.x[column.x.length - 1]);
      const { prefix, name, dataset, statistic, family } = column;
      const counted = column.aggregation === "categorical_count";
      // Rows of a panel are datasets, unless they are the members of a family or the categories of a count.
      const [rows, key] = family ? ["family", [prefix, family[0], statistic, dataset]]
        : counted ? ["category", [prefix, name, "", dataset]] : ["dataset", [prefix, name, statistic]];
      const id = JSON.stringify(["lines", rows, ...key]);
      if (!panels.has(id))
        panels.set(id, { id, kind: "lines", rows, prefix, name: family ? family[0] : name, statistic: counted ? "" : statistic,
          dataset: rows === "dataset" ? "" : dataset, series: [], order: new Map() });
      const panel = panels.get(id);
      const row = rows === "family" ? name.split("/").pop() : rows === "category" ? statistic || "all" : dataset;
      if (!panel.order.has(row)) panel.order.set(row, panel.order.size);
      panel.series.push({ run: r, row, column });
    }
    for (const map of run.maps) {
      const id = JSON.stringify(["map", r, map.prefix, map.name, map.statistic, map.dataset]);
      panels.set(id, { id, kind: map.axes.length === 1 ? "strip" : "map", prefix: map.prefix, name: map.name,
        statistic: map.statistic, dataset: map.dataset, run: r, map });
    }
    for (const heat of run.heats) {
      const id = JSON.stringify(["heat", r, heat.prefix, heat.name]);
      if (!panels.has(id)) panels.set(id, { id, kind: "heat", prefix: heat.prefix, name: heat.name, statistic: "", dataset: "", run: r, heats: [] });
      panels.get(id).heats.push(heat);
    }
  }
  if (low > high) [low, high] = [0, 1];
  state.full = low === high ? [low - 1, high + 1] : [low, high];
  state.datasets = datasets;
  state.panels = [...panels.values()];
  for (const panel of state.panels) if (panel.kind === "lines") ordered(panel, datasets);
  state.main = mainPanel();
}

const letter = (r) => (r < 26 ? "" : letter((r / 26 | 0) - 1)) + String.fromCharCode(65 + r % 26);

/** Rows in the order of the run, all datasets together first, with colours and dashes. */
function ordered(panel, datasets) {
  const rank = (row) => row === "" ? -1 : panel.rows === "dataset" ? datasets.get(row) : panel.order.get(row);
  panel.rowsShown = [...panel.order.keys()].sort((a, b) => rank(a) - rank(b));
  if (panel.rows === "dataset" && panel.rowsShown.length === 2 && panel.rowsShown[0] === "" && sameAsOverall(panel)) {
    panel.series = panel.series.filter((one) => one.row !== "");
    panel.rowsShown.shift();
  }
  const lone = panel.rowsShown.length === 1;
  const many = state.runs.length > 1;
  for (const one of panel.series) {
    const at = rank(one.row);
    // A lone row takes its colour from the run; else colours are datasets, and dashes runs or the 9th dataset on.
    one.colour = lone ? "c" + (one.run % 8) : at < 0 ? "fg" : "c" + (at % 8);
    one.dash = DASHES[(many ? one.run : Math.max(0, at) >> 3) % DASHES.length];
    one.width = at < 0 && !lone ? 2.2 : 1.6;
  }
  panel.series.sort((a, b) => a.run - b.run || rank(a.row) - rank(b.row));
}

/** Whether there is one dataset, which is all there is: then one curve says it. */
function sameAsOverall(panel) {
  const [all, own] = ["", panel.rowsShown[1]].map((row) => panel.series.filter((one) => one.row === row));
  return all.length === own.length && all.every(({ column }, i) => column.y.length === own[i].column.y.length &&
    column.y.every((value, at) => Object.is(value, own[i].column.y[at])));
}

function mainPanel() {
  const size = (panel) => panel.series.reduce((sum, one) => sum + one.column.count, 0);
  const losses = state.panels.filter((p) => p.kind === "lines" && p.rows === "dataset" && p.name === "loss" && !p.statistic);
  const trained = losses.filter((p) => !isValidation(p.prefix));
  return (trained.length ? trained : losses).sort((a, b) => size(b) - size(a))[0]
    ?? state.panels.find((p) => p.kind === "lines" && isLoss(p.name)) ?? null;
}

const rowName = (panel, row) => row === "" ? "all" : row;
const rowKey = (panel, row) => panel.rows === "dataset" && panel.rowsShown.length > 1 ? "dataset " + row : panel.id + row;

/** In full, or as its group, which says the prefix, has it. */
function titleOf(panel, grouped) {
  const parts = [grouped ? "" : panel.prefix, panel.dataset, panel.name].filter(Boolean);
  return parts.join(" / ") + (panel.statistic ? " · " + panel.statistic : "");
}

/** Groups in order: the prefix of the loss first, then as logged; in each the losses first. */
function grouped() {
  const groups = new Map();
  const place = (panel) => panel.kind === "lines" && isLoss(panel.name) ? 0 : 1;
  for (const panel of state.panels) {
    if (panel === state.main) continue;
    if (!groups.has(panel.prefix)) groups.set(panel.prefix, []);
    groups.get(panel.prefix).push(panel);
  }
  const list = [...groups].map(([prefix, panels]) => [prefix, panels.sort((a, b) => place(a) - place(b))]);
  const score = ([prefix]) => state.main && prefix === state.main.prefix ? 0 : isValidation(prefix) ? 1 : 2;
  return list.sort((a, b) => score(a) - score(b));
}

/** Statistics beyond the first few of a metric, which are folded away. */
const isMore = (panel) => panel.kind === "lines" && panel.rows === "dataset" && !byStatistic.includes(panel.statistic)
  || panel.rows === "category" && panel.dataset !== "";

// -- Scales and axes ---------------------------------------------------------------------------------------

const currentRange = () => state.range ?? state.full;

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.7);
  const ticks = [];
  const first = Math.ceil(low / step - 1e-9);
  // Counted, as beyond 2 to the 53 one more is the same number.
  for (let i = 0; i < 50 && (first + i) * step <= high + step * 1e-9; i++) ticks.push(+((first + i) * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high, count) {
  if (high / low < 12) return niceTicks(low, high, count).filter((v) => v > 0);
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / count));
  const between = every === 1 && last - first <= 3 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = first; power <= last; power += every)
    for (const m of between) { const v = +`${m}e${power}`; if (v >= low * 0.999 && v <= high * 1.001) ticks.push(v); }
  return ticks;
}

const increments = [];  // steps are whole numbers
for (let power = 0; power < 16; power++) for (const m of [1, 2, 5]) increments.push(m * 10 ** power);
const font = "11px system-ui, sans-serif";
const widest = (texts) => Math.max(0, ...texts.map((t) => t.length)) * 6.3;

function axes(yAxis, grid = true) {
  const common = {
    stroke: () => colour("dim"), grid: { stroke: () => colour("line"), width: 1 }, ticks: { show: false }, font,
  };
  common.grid.show = grid;
  return [
    { ...common, size: 24, gap: 4, space: 80, incrs: increments,
      values: (u, values) => values.map((v) => v == null ? "" : Math.abs(v) >= 1e6 ? tick(v) : whole(v)) },
    { ...common, gap: 5, ...yAxis },
  ];
}
// -- A card: the frame that every chart has -----------------------------------------------------------------

class Card {
  constructor(panel, size) {
    this.panel = panel;
    this.size = size;
    this.seen = false;  // near what is on the screen
    this.dirty = true;
    const id = "card-" + (Card.made = (Card.made ?? 0) + 1);
    this.title = el("h3", { id }, named(titleOf(panel, panel !== state.main)));
    if (panel.rowsShown?.length === 1 && panel.rowsShown[0]) this.title.append(el("small", {}, " · ", named(panel.rowsShown[0])));
    if (panel.run !== undefined && state.runs.length > 1) this.title.append(el("small", { text: " · run " + state.runs[panel.run].letter }));
    this.tools = el("span", { class: "now" });
    this.enlarge = el("button", { class: "enlarge", type: "button", "aria-label": "Enlarge", title: "enlarge (e)", "aria-pressed": "false", text: "⤢", onclick: () => this.toggleFull() });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": titleOf(panel) });
    this.body = el("div", { class: "body" }, this.plot);
    this.note = el("p", { class: "note" });
    this.root = el("section", { class: "card " + size, "aria-labelledby": id },
      el("header", {}, this.title, this.tools, this.enlarge), this.body, this.note);
    this.root.card = this;
  }

  get height() { return this.full ? Math.max(320, innerHeight - 260) : this.size === "large" ? 350 : this.size.startsWith("wide") ? 190 : 150; }

  get full() { return state.enlarged.has(this.panel.id); }

  toggleFull() {
    if (!state.enlarged.delete(this.panel.id)) state.enlarged.add(this.panel.id);
    this.mark();
    this.refresh();
    this.root.scrollIntoView({ block: "nearest" });
  }

  /** Take the room that the chart will need, also before it is drawn. */
  mark() {
    this.root.classList.toggle("full", this.full);
    this.enlarge.setAttribute("aria-pressed", String(this.full));
    this.plot.style.minHeight = this.height + "px";
  }

  /** Draw anew now if it can be seen, else when it can. */
  refresh() {
    this.dirty = true;
    if (this.seen) this.drawNow();
  }

  drawNow() {
    if (!this.dirty || !this.root.isConnected || !this.plot.clientWidth) return;
    this.dirty = false;
    this.draw();
  }

  applyRange() { if (this.chart) { if (this.seen) this.chart.setScale("x", rangeOf()); else this.dirty = true; } }
  recolour() { this.refresh(); }
  showCursor() {}
  resize() { if (this.chart && this.chart.width !== this.plot.clientWidth) this.refresh(); }
  destroy() { this.chart?.destroy(); this.chart = null; }
}

const rangeOf = () => { const [min, max] = currentRange(); return { min, max }; };

/** What all charts over steps share: zoom by dragging, one cursor, and the way back. */
function chartOptions(card, more) {
  return {
    width: card.plot.clientWidth, height: card.height, legend: { show: false }, pxAlign: 1,
    ...more,
    cursor: {
      sync: { key: "steps", setSeries: false, scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave", sub: () => true } },
      drag: { x: true, y: false, setScale: false, dist: 4 }, y: false, points: { show: false },
      bind: { dblclick: () => () => { zoom(RANGE_ALL); return null; } },
      ...more.cursor,
    },
    scales: { x: { time: false, range: () => currentRange() }, y: more.y },
    hooks: {
      ...more.hooks,
      setSelect: [(u) => {
        const { left, width } = u.select;
        if (width > 0) zoom([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
        u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      }],
      ready: [(u) => {
        u.over.addEventListener("mouseenter", () => { state.source = u; });
        u.over.addEventListener("mouseleave", () => moveCursor(null));
      }],
      setCursor: [(u) => {
        if (u !== state.source || u.cursor.left < 0 || u.cursor.idx == null) return;
        moveCursor(u.data[0][u.cursor.idx]);
        card.hover?.(u);
      }],
    },
  };
}

// -- Curves ------------------------------------------------------------------------------------------------

const union = (grids) => {
  const distinct = [...new Set(grids)];
  if (distinct.length === 1) return distinct[0];
  const all = new Float64Array(distinct.reduce((sum, grid) => sum + grid.length, 0));
  let at = 0;
  for (const grid of distinct) { all.set(grid, at); at += grid.length; }
  all.sort();
  let count = 0;
  for (let i = 0; i < all.length; i++) if (!i || all[i] !== all[i - 1]) all[count++] = all[i];
  return all.subarray(0, count);
};

/** Values over `grid` for uPlot: null is a gap, undefined a step at which this curve has no log. */
function laid(x, y, grid, log) {
  const out = new Array(grid.length);
  if (x === grid) {
    for (let i = 0; i < y.length; i++) { const v = y[i]; out[i] = Number.isFinite(v) && (!log || v > 0) ? v : null; }
    return out;
  }
  for (let i = 0, j = 0; i < grid.length; i++) {
    if (j < x.length && x[j] === grid[i]) { const v = y[j++]; out[i] = Number.isFinite(v) && (!log || v > 0) ? v : null; }
    else out[i] = undefined;
  }
  return out;
}

/** The places of values that no line reaches, because both sides are gaps or ends. */
function lonely(values) {
  const found = [];
  let row = 0, last = -1;
  for (let i = 0; i <= values.length; i++) {
    if (i < values.length && values[i] === undefined) continue;
    if (i < values.length && values[i] !== null) { row++; last = i; continue; }
    if (row === 1) found.push(last);
    row = 0;
  }
  return found;
}

class Lines extends Card {
  constructor(panel, size) {
    super(panel, size);
    this.many = panel.series.length > 1;
    this.table = el("table");
    this.head = el("tr");
    this.rows = [];
    if (this.many) {
      this.table.append(el("thead", {}, this.head));
      const bodyOf = el("tbody");
      this.table.append(bodyOf);
      // Rows are datasets; of a metric without datasets they are the runs.
      this.byRun = panel.rowsShown.length === 1;
      const lists = this.byRun ? panel.series.map((one) => [one]) : panel.rowsShown.map((row) => panel.series.filter((one) => one.row === row));
      for (const list of lists) {
        const [{ row, run }] = list, text = this.byRun ? `${state.runs[run].letter} ${state.runs[run].label}` : rowName(panel, row);
        const button = el("button", { class: "series", type: "button", "aria-pressed": "true",
          title: "hide or show; with Shift alone", onclick: (event) => toggleRow(this.panel, key, event.shiftKey || event.altKey) },
          swatch(list[0]), el("span", { class: "name", dir: "auto", text }));
        const key = this.byRun ? rowKey(panel, "run " + run) : rowKey(panel, row);
        const line = el("tr", { class: !this.byRun && row === "" ? "all" : "" }, el("td", { class: "name", title: text }, button));
        const shows = (one) => one.row === row && (!this.byRun || one.run === run);
        line.addEventListener("mouseenter", () => this.focus(shows));
        line.addEventListener("mouseleave", () => this.focus(null));
        button.addEventListener("focus", () => this.focus(shows));
        button.addEventListener("blur", () => this.focus(null));
        bodyOf.append(line);
        this.rows.push({ key, shows, line, button, list, cells: [] });
      }
      this.values = el("div", { class: "values", tabindex: "0", role: "region", "aria-label": "Values of " + titleOf(panel) }, this.table);
      this.values.style.maxHeight = this.height + "px";
      this.body.append(this.values);
      this.columns();
    }
  }

  /** The columns of the table: each asks a row for a text. */
  columns() {
    const runs = state.runs.filter((_, r) => this.panel.series.some((one) => one.run === r) && (r === 0 || state.others));
    const large = this.size === "large" || this.full;
    const of = (row, r) => row.list.find((one) => one.run === r)?.column;
    const list = [];
    const any = this.panel.series.some((one) => smoothCurve(one.column));
    if (this.byRun || state.runs.length === 1) {
      const own = (row) => row.list[0].column;
      list.push(["value", (row, step) => at(own(row), step)]);
      if (large && any) list.push(["smoothed", (row, step) => at(smoothCurve(own(row)) ?? own(row), step)]);
      if (large && this.byRun) list.push(["best", (row) => bestOf(own(row))?.value]);
    } else {
      for (const run of runs) {
        const r = state.runs.indexOf(run);
        list.push([run.letter, (row, step) => { const c = of(row, r); return c && at(smoothCurve(c) ?? c, step); }]);
      }
      if (runs.length === 2) {
        const [a, b] = runs.map((run) => state.runs.indexOf(run));
        list.push([`${runs[1].letter} − ${runs[0].letter}`, (row, step) => {
          const [one, two] = [of(row, a), of(row, b)].map((c) => c && at(smoothCurve(c) ?? c, step));
          return one == null || two == null ? null : two - one;
        }, true]);
      }
    }
    if (large && !this.byRun && this.panel.series.some((one) => one.column.better))
      for (const run of runs) {
        const r = state.runs.indexOf(run);
        list.push([run.letter ? "best " + run.letter : "best", (row) => { const c = of(row, r); return c && bestOf(c)?.value; }]);
        if (runs.length === 1) list.push(["at step", (row) => { const c = of(row, r), best = c && bestOf(c); return best ? best.step : null; }, false, whole]);
      }
    this.columnsShown = list;
    this.corner = el("th", { scope: "col" });
    this.head.replaceChildren(this.corner, ...list.map(([text]) => el("th", { scope: "col", text })));
    for (const row of this.rows) {
      for (const cell of row.cells) cell.remove();
      row.cells = list.map(() => el("td"));
      row.line.append(...row.cells);
    }
  }

  fill(step) {
    if (!this.many) {
      const { column } = this.panel.series[0];
      this.tools.textContent = (step == null ? "" : `step ${whole(step)}: `) + shown(at(column, step));
      return;
    }
    this.corner.textContent = step == null ? "last" : "step " + whole(step);
    for (const row of this.rows)
      for (const [i, [, ask, signed, format]] of this.columnsShown.entries()) {
        const value = ask(row, step);
        row.cells[i].textContent = signed ? difference(value) : value == null ? "–" : (format ?? shown)(value);
        row.cells[i].classList.toggle("gap", typeof value === "number" && !Number.isFinite(value));
      }
  }

  showCursor(step) { if (this.seen) this.fill(step); }

  tracks() {
    const off = (one) => state.hidden.has(rowKey(this.panel, this.byRun ? "run " + one.run : one.row));
    return this.panel.series.filter((one) => (one.run === 0 || state.others || this.panel.series.every((s) => s.run !== 0)) && !off(one));
  }

  draw() {
    this.destroy();
    if (this.many) {
      this.values.style.maxHeight = this.height + "px";
      this.columns();
      for (const row of this.rows) {
        const off = state.hidden.has(row.key);
        row.line.classList.toggle("off", off);
        row.button.setAttribute("aria-pressed", String(!off));
      }
    }
    this.fill(state.cursor);
    const tracks = this.tracks();
    // A logarithm needs something above zero.
    const log = state.log && tracks.some(({ column }) => column.y.some((v) => v > 0 && v < Infinity));
    const curves = tracks.map((one) => ({ ...one, raw: one.column, smooth: smoothCurve(one.column) }));
    const grid = curves.length ? union(curves.flatMap((c) => [c.raw.x, ...(c.smooth ? [c.smooth.x] : [])])) : new Float64Array(0);
    const data = [grid], series = [{}];
    this.curveAt = [];
    const add = (curve, part, style) => {
      const values = laid(part.x, part.y, grid, log);
      const alone = lonely(values);
      data.push(values);
      series.push({
        label: rowName(this.panel, curve.row), stroke: () => colour(curve.colour), dash: curve.dash, spanGaps: false, ...style,
        points: { show: true, size: 4, width: 1, fill: () => colour(curve.colour), filter: (u, i, show) => pointsShown(u, part.x, values, alone) },
      });
    };
    for (const curve of curves) if (curve.smooth) add(curve, curve.raw, { width: 1, alpha: 0.2, dash: [] });
    for (const curve of curves) { this.curveAt[data.length] = curve; add(curve, curve.smooth ?? curve.raw, { width: curve.smooth ? curve.width : Math.min(curve.width, 1.9) }); }
    this.log = log;
    this.marks = curves.map((curve) => ({ colour: curve.colour, list: marksOf(curve.raw, log) })).filter(({ list }) => list.length);
    this.alerts = [...new Set(this.panel.series.flatMap(({ run, row }) => state.runs[run].alerts.filter((alert) =>
      alert.name === this.panel.name && alert.prefix === this.panel.prefix && (alert.dataset ?? "") === row).map((alert) => alert.step)))].slice(-40);
    const labels = this.size === "large" || this.full;
    this.endLabels = labels && this.many && innerWidth > 620;
    const right = this.endLabels ? clamp(widest(curves.map((c) => this.endName(c))) + 14, 30, 130) : 24;
    this.chart = new uPlot(chartOptions(this, {
      padding: [labels ? 16 : 10, right, 0, 0],
      y: { distr: log ? 3 : 1, range: (u, low, high) => this.range(u, low, high, log) },
      focus: { alpha: 0.12 },
      axes: axes({
        size: (u, values) => Math.max(34, widest(values ?? []) + 10),
        splits: (u, axis, low, high) => (log ? logTicks : niceTicks)(low, high, Math.max(3, this.height / 42 | 0)),
        filter: (u, splits) => splits, values: (u, splits) => splits.map(tick),
      }),
      series,
      hooks: { drawAxes: [(u) => this.under(u)], draw: [(u) => this.over(u)] },
    }), data, this.plot);
    this.describe(log);
  }

  range(u, low, high, log) {
    if (low == null || high == null || !Number.isFinite(low) || !Number.isFinite(high)) return log ? [0.1, 10] : [0, 1];
    if (state.outliers) [low, high] = this.inner(u, low, high);
    if (log) { const pad = Math.max(1.02, (high / low) ** 0.05); return [low / pad, high * pad]; }
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    return [low - pad, high + pad];
  }

  /** Between what all but 1 % on each side of the values in view are. */
  inner(u, low, high) {
    const [min, max] = currentRange();
    const values = [];
    for (let s = 1; s < u.data.length; s++) {
      const first = Math.max(0, lastUpTo(u.data[0], min)), last = lastUpTo(u.data[0], max);
      const every = Math.max(1, (last - first) / 2000 | 0);
      for (let i = first; i <= last; i += every) if (u.data[s][i] != null) values.push(u.data[s][i]);
    }
    if (values.length < 20) return [low, high];
    values.sort((a, b) => a - b);
    return [values[values.length * 0.01 | 0], values[Math.min(values.length - 1, values.length * 0.99 | 0)]];
  }

  /** What stands under the curves: at which steps there were alerts. */
  under(u) {
    const { ctx, bbox } = u, ratio = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = colour("bad");
    ctx.globalAlpha = 0.22;
    for (const step of this.alerts) ctx.fillRect(Math.round(u.valToPos(step, "x", true) - 2.5 * ratio), bbox.top, 5 * ratio, bbox.height);
    ctx.restore();
  }

  /** What stands over the curves: marks of what is not finite, and names at their ends. */
  over(u) {
    const { ctx, bbox } = u, ratio = devicePixelRatio, labels = this.size === "large" || this.full;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, 0, bbox.width, bbox.top + bbox.height);
    ctx.clip();
    ctx.font = `${11 * ratio}px system-ui`;
    ctx.textAlign = "center";
    const told = [], few = this.marks.reduce((sum, { list }) => sum + list.length, 0) <= 12;
    for (const { colour: name, list } of this.marks) {
      ctx.fillStyle = colour(name);
      let last = -1e9;
      for (const { x, low, text } of list) {
        const at = u.valToPos(x, "x", true);
        if (at < bbox.left || at > bbox.left + bbox.width || at - last < 5 * ratio) continue;
        last = at;
        const y = low ? bbox.top + bbox.height : bbox.top;
        ctx.beginPath();
        const way = low ? -1 : 1;
        ctx.moveTo(at, y + way * 7 * ratio); ctx.lineTo(at - 4 * ratio, y); ctx.lineTo(at + 4 * ratio, y);
        ctx.fill();
        if (labels && few && !low && !told.some((other) => Math.abs(other - at) < 26 * ratio)) {
          told.push(at);
          ctx.fillText(text, at, bbox.top - 4 * ratio);
        }
      }
    }
    ctx.restore();
    if (this.endLabels) this.nameEnds(u);
  }

  endName(curve) { return this.byRun ? state.runs[curve.run].letter : rowName(this.panel, curve.row); }

  nameEnds(u) {
    const { ctx, bbox } = u, ratio = devicePixelRatio;
    const [, max] = currentRange();
    const places = [];
    const seen = new Set();
    for (const [i, curve] of this.curveAt.entries()) {
      const name = curve && this.endName(curve);
      if (!curve || seen.has(name)) continue;
      const part = curve.smooth ?? curve.raw;
      for (let at = lastUpTo(part.x, max); at >= 0; at--)
        if (Number.isFinite(part.y[at]) && (!this.log || part.y[at] > 0)) {
          seen.add(name);
          places.push({ y: u.valToPos(part.y[at], "y", true), curve });
          break;
        }
    }
    const gap = 12.5 * ratio, top = bbox.top + 5 * ratio, bottom = bbox.top + bbox.height;
    const room = Math.max(1, Math.floor((bottom - top) / gap));
    const kept = places.filter(({ y }) => y >= bbox.top - 2 && y <= bottom + 2).slice(0, room).sort((a, b) => a.y - b.y);
    // Push labels apart downwards, then back up from the bottom.
    for (let i = 0; i < kept.length; i++) kept[i].at = Math.max(kept[i].y, i ? kept[i - 1].at + gap : top);
    for (let i = kept.length - 1, limit = bottom; i >= 0; i--) { kept[i].at = Math.min(kept[i].at, limit); limit = kept[i].at - gap; }
    ctx.save();
    ctx.font = `${11 * ratio}px system-ui`;
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    for (const { at, curve } of kept) {
      ctx.fillStyle = colour(curve.colour);
      ctx.fillText(fitted(ctx, this.endName(curve), 118 * ratio), bbox.left + bbox.width + 5 * ratio, at);
    }
    ctx.restore();
  }

  hover(u) {
    if (!this.many) return;
    const at = u.cursor.idx, y = u.cursor.top;
    let best = null, distance = 30;
    for (const [i, curve] of this.curveAt.entries()) {
      const value = curve && u.data[i][at];
      if (value == null) continue;
      const away = Math.abs(u.valToPos(value, "y") - y);
      if (away < distance) [best, distance] = [curve, away];
    }
    for (const row of this.rows) row.line.classList.toggle("near", best !== null && row.shows(best));
  }

  focus(shows) {
    if (!this.chart) return;
    const at = shows ? this.curveAt.findIndex((curve) => curve && shows(curve)) : -1;
    this.chart.setSeries(at > 0 ? at : null, { focus: at > 0 });
  }

  describe(log) {
    const { panel } = this;
    const bad = panel.series.filter((one) => one.column.bad);
    const parts = [];
    if (bad.length) {
      const texts = bad.slice(0, 3).map((one) => {
        const [count, first, last] = one.column.bad;
        const who = [state.runs[one.run].letter, this.many ? rowName(panel, one.row) : ""].filter(Boolean).join(" ");
        return `${who ? "\u2068" + who + "\u2069 " : ""}${count === 1 ? "at step " + whole(first) : `${whole(count)} times, step ${whole(first)} to ${whole(last)}`}`;
      });
      parts.push("not finite: " + texts.join("; ") + (bad.length > 3 ? `; and ${bad.length - 3} more` : ""));
    }
    if (state.log && !log) parts.push("nothing above zero: no logarithm");
    else if (log) {
      const below = panel.series.reduce((sum, { column }) => sum + belowZero(column), 0);
      if (below) parts.push(`${whole(below)} ${below === 1 ? "value" : "values"} at or below zero (marked at the bottom)`);
    }
    this.note.textContent = parts.join(" · ");
    this.note.classList.toggle("bad", bad.length > 0);
    const last = panel.series[0].column;
    this.plot.setAttribute("aria-label", `${titleOf(panel)}: ${panel.series.length === 1 ? "one curve" : panel.series.length + " curves"}, ` +
      `step ${whole(last.x[0])} to ${whole(last.x[last.x.length - 1])}, last value ${shown(last.y[last.y.length - 1])}`);
  }
}

const belowZero = (column) => column.below ??= column.y.reduce((sum, v) => sum + (v <= 0 && Number.isFinite(v) ? 1 : 0), 0);

function at(curve, step) {
  const place = step == null ? curve.x.length - 1 : lastUpTo(curve.x, step);
  return place < 0 ? null : curve.y[place];
}

function marksOf(column, log) {
  if (!column.bad && !log) return [];
  const found = [];
  const { x, y } = column;
  for (let i = 0; i < y.length; i++) {
    if (!Number.isFinite(y[i])) found.push({ x: x[i], low: y[i] === -Infinity, text: shown(y[i]) });
    else if (log && y[i] <= 0) found.push({ x: x[i], low: true, text: "" });
  }
  return found;
}

/** Points where a curve has few, and where no line reaches them. */
function pointsShown(u, x, values, alone) {
  const [min, max] = currentRange();
  const count = lastUpTo(x, max) - Math.max(0, lastUpTo(x, min));
  if (count > u.bbox.width / devicePixelRatio / 14) return alone;
  const found = [];
  for (let i = 0; i < values.length; i++) if (values[i] != null) found.push(i);
  return found;
}

function fitted(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  const letters = [...text];
  while (letters.length > 1 && ctx.measureText(letters.join("") + "…").width > width) letters.pop();
  return letters.join("") + "…";
}

function swatch(one) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), line = document.createElementNS(space, "line");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  for (const [name, value] of [["x1", 0], ["x2", 22], ["y1", 4], ["y2", 4], ["stroke-width", one.width + 0.6]]) line.setAttribute(name, value);
  if (one.dash.length) line.setAttribute("stroke-dasharray", one.dash.join(" "));
  line.style.stroke = `var(--${one.colour})`;
  svg.append(line);
  return svg;
}

/** Hide or show a row, here and, if it is a dataset, in all charts; or show it alone, and all again. */
function toggleRow(panel, key, alone) {
  if (alone) {
    const lone = panel.rowsShown.length === 1;
    const keys = lone ? panel.series.map((one) => rowKey(panel, "run " + one.run)) : panel.rowsShown.map((row) => rowKey(panel, row));
    const only = !state.hidden.has(key) && keys.every((one) => one === key || state.hidden.has(one));
    for (const one of keys) if (only || one === key) state.hidden.delete(one); else state.hidden.add(one);
  } else if (!state.hidden.delete(key)) state.hidden.add(key);
  refreshAll();
}

// -- Maps: colours for numbers -------------------------------------------------------------------------------

const RAMPS = {
  light: ["ffffff", "deebf7", "9ecae1", "4292c6", "08519c", "081d58"],
  dark: ["161b21", "183656", "1c6196", "4696be", "96cdc8", "f0f9dc"],
  lightBoth: ["08519c", "4292c6", "bdd7e7", "f7f7f7", "fdcc8a", "e08214", "7f3b08"],
  darkBoth: ["9ecae1", "4292c6", "16466f", "1d232a", "6b3d0c", "d07a1c", "fdd49e"],
};
const ramps = {};
function ramp(both) {
  const name = (state.dark ? "dark" : "light") + (both ? "Both" : "");
  if (ramps[name]) return ramps[name];
  const stops = RAMPS[name].map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const table = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const t = i / 255 * (stops.length - 1), at = Math.min(stops.length - 2, t | 0);
    for (let c = 0; c < 3; c++) table[3 * i + c] = stops[at][c] + (stops[at + 1][c] - stops[at][c]) * (t - at);
  }
  return ramps[name] = table;
}

/** How values become colours: from the least to the largest, or about zero where there are both signs. */
function scaleOf(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (Number.isFinite(v)) { if (v < low) low = v; if (v > high) high = v; }
  if (low > high) [low, high] = [0, 1];
  const both = low < 0 && high > 0;
  if (both) { high = Math.max(-low, high); low = -high; }
  // What is little above zero starts there, so that no colour is zero.
  else if (low > 0 && low < 0.3 * high) low = 0;
  const span = high - low || 1;
  return { low, high, both, place: (v) => clamp((v - low) / span * 255 | 0, 0, 255) };
}

/** The colour of a cell: null where nothing was logged, -1 for what is not finite. */
const placed = (map, at, scale) => map.holes?.[at] ? null : Number.isFinite(map.y[at]) ? scale.place(map.y[at]) : -1;
const cellOf = (map, at) => map.holes?.[at] ? null : map.y[at];

function painted(width, height, at, both) {
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = height;
  const ctx = canvas.getContext("2d"), image = ctx.createImageData(width, height), table = ramp(both);
  const bad = /^#(..)(..)(..)$/.exec(colour("bad")).slice(1).map((h) => parseInt(h, 16));
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const place = at(x, y), to = 4 * (y * width + x);
      if (place == null) continue;  // nothing there
      for (let c = 0; c < 3; c++) image.data[to + c] = place < 0 ? bad[c] : table[3 * place + c];
      image.data[to + 3] = 255;
    }
  ctx.putImageData(image, 0, 0);
  return canvas;
}

function scaleBar(low, high, both) {
  const bar = el("canvas", { "aria-hidden": "true" });
  bar.width = 128; bar.height = 1;
  bar.getContext("2d").drawImage(painted(128, 1, (x) => x * 2, both), 0, 0);
  return el("span", { class: "scale" }, low, bar, high);
}

/** Something over steps in rows: a distribution, or a value for each place of an axis. */
class Strip extends Card {
  constructor(panel, size) {
    super(panel, size);
    if (panel.kind === "heat") {
      this.pick = el("select", { "aria-label": "Dataset" });
      for (const [i, heat] of panel.heats.entries()) this.pick.append(el("option", { value: i, text: heat.dataset || "all" }));
      this.pick.addEventListener("change", () => this.refresh());
      if (panel.heats.length > 1) this.title.append(" ", this.pick);
      else if (panel.heats[0].dataset) this.title.append(el("small", {}, " · ", named(panel.heats[0].dataset)));
    }
  }

  content() {
    const { panel } = this;
    if (panel.kind === "heat") {
      const heat = panel.heats[Math.min(this.pick.selectedIndex, panel.heats.length - 1)] ?? panel.heats[0];
      const bins = heat.edges.length - 1, [low, high] = [heat.edges[0], heat.edges[bins]];
      const place = heat.log ? (v) => bins * Math.log(v / low) / Math.log(high / low) : (v) => bins * (v - low) / (high - low);
      const ticks = (heat.log ? logTicks : niceTicks)(low, high, 5).map((v) => [place(v), tick(v)]);
      const share = (j, i) => (heat.shares[j * bins + i] / 255) ** 2 * heat.most;
      return {
        x: heat.x, rows: bins, ticks, both: false,
        at: (j, i) => heat.shares[j * bins + i] || null,
        tip: (j, i) => `step ${whole(heat.x[j])}: ${trimmed((100 * share(j, i)).toPrecision(2))} % from ${shown(heat.edges[i])} to ${shown(heat.edges[i + 1])}`,
        note: `share of the values in each of ${bins} bins` + (heat.logs ? `, ${whole(heat.logs)} logs` : ""),
        scale: ["0", trimmed((100 * heat.most).toPrecision(2)) + " %"],
      };
    }
    const { map } = panel, [[axis, labels]] = map.axes, rows = labels.length, scale = this.scale ??= scaleOf(map.y);
    const every = Math.ceil(rows / Math.max(2, this.height / 22 | 0));
    return {
      x: map.x, rows, both: scale.both, down: true,
      ticks: labels.map((text, i) => [i + 0.5, text]).filter((_, i) => i % every === 0),
      at: (j, i) => placed(map, j * rows + i, scale),
      tip: (j, i) => `step ${whole(map.x[j])}, ${axis} ${labels[i]}: ${shown(cellOf(map, j * rows + i))}`,
      note: `${axis} × step` + (map.x.length < map.logs ? `, ${map.x.length} of ${whole(map.logs)} logs` : ""),
      scale: [shown(scale.low), shown(scale.high)],
    };
  }

  draw() {
    this.destroy();
    const content = this.content();
    const { x, rows } = content;
    const picture = painted(x.length, rows, (j, i) => content.at(j, content.down ? i : rows - 1 - i), content.both);
    // Each log has the steps that are nearest to it.
    const after = (j) => j + 1 < x.length ? (x[j] + x[j + 1]) / 2 : x[j] + (j ? x[j] - x[j - 1] : 2) / 2;
    const before = (j) => j ? (x[j - 1] + x[j]) / 2 : x[0] - (x.length > 1 ? x[1] - x[0] : 2) / 2;
    this.note.textContent = content.note;
    this.tools.replaceChildren(scaleBar(content.scale[0], content.scale[1], content.both));
    this.plot.setAttribute("aria-label", `${titleOf(this.panel)}: ${content.note}`);
    this.chart = new uPlot(chartOptions(this, {
      padding: [4, 24, 0, 0],
      cursor: { y: true },
      y: { range: () => [0, rows], dir: content.down ? -1 : 1 },
      axes: axes({
        size: () => clamp(widest(content.ticks.map(([, text]) => text)) + 10, 34, 120),
        splits: () => content.ticks.map(([place]) => place), filter: (u, splits) => splits,
        values: () => content.ticks.map(([, text]) => text.length > 18 ? text.slice(0, 17) + "…" : text),
      }, false),
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: { drawClear: [(u) => {
        const { ctx, bbox } = u;
        ctx.save();
        ctx.beginPath();
        ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
        ctx.clip();
        ctx.imageSmoothingEnabled = false;
        for (let j = 0; j < x.length; j++) {
          const from = u.valToPos(before(j), "x", true), to = u.valToPos(after(j), "x", true);
          if (to < bbox.left || from > bbox.left + bbox.width) continue;
          ctx.drawImage(picture, j, 0, 1, rows, Math.floor(from), bbox.top, Math.max(1, Math.ceil(to) - Math.floor(from)), bbox.height);
        }
        ctx.restore();
      }] },
    }), [x, new Array(x.length).fill(0)], this.plot);
    this.contentNow = content;
  }

  hover(u) {
    const { x, rows, tip } = this.contentNow;
    const step = u.posToVal(u.cursor.left, "x");
    const next = clamp(lastUpTo(x, step) + 1, 0, x.length - 1), j = next && step - x[next - 1] < x[next] - step ? next - 1 : next;
    const i = clamp(Math.floor(u.posToVal(u.cursor.top, "y")), 0, rows - 1);
    this.note.textContent = tip(j, i);
  }

  showCursor(step) { if (step == null && this.contentNow) this.note.textContent = this.contentNow.note; }
}

/** An array with two axes or more, at one log. */
class Grid extends Card {
  constructor(panel, size) {
    super(panel, size);
    const { map } = panel;
    this.lead = map.axes.slice(0, -2).map(([name, labels]) => {
      const pick = el("select", { "aria-label": name, title: name }, ...labels.map((text, i) => el("option", { value: i, text: `${name} ${text}` })));
      pick.addEventListener("change", () => this.refresh());
      this.title.append(" ", pick);
      return pick;
    });
    this.canvas = el("canvas", { class: "map", tabindex: "0", role: "img", "aria-label": titleOf(panel) });
    this.plot.removeAttribute("role");
    this.plot.removeAttribute("aria-label");
    this.plot.append(this.canvas);
    if (map.x.length > 1) {
      this.slider = el("input", { type: "range", min: 0, max: map.x.length - 1, value: map.x.length - 1, "aria-label": "Step" });
      this.slider.addEventListener("input", () => this.refresh());
      this.root.insertBefore(el("label", { class: "scale" }, "step", this.slider, this.stepText = el("output")), this.note);
    }
    this.canvas.addEventListener("mousemove", (event) => this.point(event.offsetX, event.offsetY));
    this.canvas.addEventListener("mouseleave", () => { this.cell = null; this.tell(); });
    this.canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move || event.ctrlKey || event.metaKey) return;
      const [rows, columns] = this.shape, [i, j] = this.cell ?? [0, -1];
      this.cell = [clamp(i + move[0], 0, rows - 1), clamp(j + move[1], 0, columns - 1)];
      this.tell();
      event.preventDefault();
      event.stopPropagation();
    });
  }

  get shape() { return this.panel.map.axes.slice(-2).map(([, labels]) => labels.length); }
  get height() { return this.full ? super.height : clamp(this.shape[0] * 7 + 24, 190, 300); }

  place(i, j) {
    const { map } = this.panel, [rows, columns] = this.shape;
    const log = this.slider ? +this.slider.value : map.x.length - 1;
    let at = log;
    for (const [k, pick] of this.lead.entries()) at = at * map.axes[k][1].length + Math.max(0, pick.selectedIndex);
    return (at * rows + i) * columns + j;
  }

  draw() {
    const { map } = this.panel, [rows, columns] = this.shape, [[down, names], [across, heads]] = map.axes.slice(-2);
    const scale = this.scale ??= scaleOf(map.y);
    const width = this.plot.clientWidth, height = this.height, ratio = devicePixelRatio;
    this.canvas.width = width * ratio; this.canvas.height = height * ratio;
    this.canvas.style.height = height + "px";
    const left = clamp(widest(names) + 12, 28, 130);
    this.box = { left, top: 0, width: width - left - 4, height: height - 20 };
    const ctx = this.canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.imageSmoothingEnabled = false;
    const picture = painted(columns, rows, (j, i) => placed(map, this.place(i, j), scale), scale.both);
    ctx.drawImage(picture, left, 0, this.box.width, this.box.height);
    ctx.strokeStyle = colour("edge");
    ctx.strokeRect(left + .5, .5, this.box.width - 1, this.box.height - 1);
    ctx.fillStyle = colour("dim");
    ctx.font = font;
    ctx.textBaseline = "middle";
    const high = this.box.height / rows, wide = this.box.width / columns;
    for (let i = 0, every = Math.ceil(14 / high); i < rows; i += every) ctx.fillText(fitted(ctx, names[i], left - 8), 2, Math.max(6, (i + .5) * high));
    ctx.textAlign = "center";
    const need = widest(heads) + 10;
    for (let j = 0, every = Math.ceil(need / wide); j < columns; j += every) {
      const text = fitted(ctx, heads[j], Math.max(need, 40));
      ctx.fillText(text, clamp(left + (j + .5) * wide, left + ctx.measureText(text).width / 2, width - ctx.measureText(text).width / 2), height - 9);
    }
    this.tools.replaceChildren(scaleBar(shown(scale.low), shown(scale.high), scale.both));
    if (this.stepText) this.stepText.textContent = whole(map.x[+this.slider.value]);
    this.tell();
    this.canvas.setAttribute("aria-label", `${titleOf(this.panel)}: ${rows} ${down} × ${columns} ${across}; arrow keys read its cells`);
  }

  point(x, y) {
    const { left, width, height } = this.box, [rows, columns] = this.shape;
    const j = Math.floor((x - left) / width * columns), i = Math.floor(y / height * rows);
    this.cell = i >= 0 && j >= 0 && i < rows && j < columns ? [i, j] : null;
    this.tell();
  }

  tell() {
    const { map } = this.panel, [[down, names], [across, heads]] = map.axes.slice(-2);
    const step = map.x[this.slider ? +this.slider.value : map.x.length - 1];
    this.note.textContent = this.cell
      ? `${down} ${names[this.cell[0]]}, ${across} ${heads[this.cell[1]]}: ${shown(cellOf(map, this.place(...this.cell)))} (step ${whole(step)})`
      : `${down} × ${across}, step ${whole(step)}` + (map.x.length < map.logs ? ` (${map.x.length} of ${whole(map.logs)} logs)` : "");
  }

  resize() { if (this.canvas.width !== Math.round(this.plot.clientWidth * devicePixelRatio)) this.refresh(); }
  applyRange() {}
}

// -- Tiles and notes -----------------------------------------------------------------------------------------

function overall(panel, r) {
  const own = panel?.series.filter((one) => one.run === r) ?? [];
  return (own.find((one) => one.row === "") ?? own[0])?.column ?? null;
}

function tile(title, value, lines = [], kind = "") {
  return el("div", { class: "tile " + kind }, el("h2", {}, named(title)), el("b", { text: value }),
    ...lines.filter(Boolean).map((line) => el("p", { dir: "auto", text: line })));
}

function tiles() {
  const list = [];
  const { runs, main } = state;
  const losses = runs.map((_, r) => overall(main, r));
  const mine = losses[0] ?? losses.find(Boolean);
  const label = (r, text) => runs.length > 1 ? `${runs[r].letter} ${text}` : text;
  if (mine) {
    const now = recent(mine), last = mine.y[mine.y.length - 1];
    const name = [main.prefix, main.name].filter(Boolean).join(" ") + (mine.dataset ? " of " + mine.dataset : "");
    const others = losses.slice(1).map((c, i) => c && `${runs[i + 1].letter} ${shown(recent(c).mean)}`).filter(Boolean);
    list.push(tile(label(0, name) + (now.logs ? `, last ${now.logs} ${now.logs === 1 ? "log" : "logs"}` : ""), shown(now.mean),
      [others.slice(0, 3).join(" · ") || `last log ${shown(last)}`],
      Number.isFinite(last) ? "" : "bad"));
    if (losses[0] && losses[1]) list.push(against(losses[0], losses[1]));
    else if (runs.length === 1) list.push(change(mine));
  }
  const checked = state.panels.find((p) => p.kind === "lines" && p.rows === "dataset" && isValidation(p.prefix) && p.name === "loss")
    ?? state.panels.find((p) => p.kind === "lines" && p.rows === "dataset" && isValidation(p.prefix) && p.series.some((s) => s.column.better));
  const judged = checked ?? main;
  if (judged) {
    const bests = runs.map((_, r) => { const c = overall(judged, r); return c && bestOf(c); });
    const first = bests.findIndex(Boolean);
    if (first >= 0)
      list.push(tile(label(first, `best ${[judged.prefix, judged.name].filter(Boolean).join(" ")}`), shown(bests[first].value),
        [`at step ${whole(bests[first].step)}`, bests.slice(first + 1).map((b, i) => b && `${runs[first + 1 + i].letter} ${shown(b.value)} at ${whole(b.step)}`).filter(Boolean).slice(0, 3).join(" · ")]));
  }
  list.push(...speed());
  list.push(trouble());
  $("tiles").replaceChildren(...list);
}

function against(a, b) {
  // The same steps of both, so that one that is further is not called better for it.
  const logs = a.means && b.means ? a.means.length : 1;
  if (a.means && b.means) [a, b] = [{ x: a.means.x, y: a.means.y, better: a.better }, b.means];
  const [low, high] = [Math.max(a.x[0], b.x[0]), Math.min(a.x[a.x.length - 1], b.x[b.x.length - 1])];
  const differences = [];
  for (let i = lastUpTo(a.x, high); i >= 0 && a.x[i] >= low && differences.length * logs < RECENT; i--) {
    const other = lastUpTo(b.x, a.x[i]);
    if (other >= 0 && b.x[other] === a.x[i] && Number.isFinite(a.y[i]) && Number.isFinite(b.y[other])) differences.push(b.y[other] - a.y[i]);
  }
  const [A, B] = state.runs;
  if (!differences.length) return tile(`${B.letter} − ${A.letter}`, "–", ["no step in common"]);
  const mean = differences.reduce((sum, d) => sum + d, 0) / differences.length;
  const which = !a.better || mean === 0 ? "" : (mean < 0) === (a.better === "lower") ? `${B.letter} is better` : `${A.letter} is better`;
  return tile(`${B.letter} − ${A.letter}, last ${differences.length * logs} common logs`, difference(mean), [[which, `up to step ${whole(high)}`].filter(Boolean).join(", "), changedSettings()]);
}

function change(column) {
  const { x, y } = column.means ?? column, count = Math.max(1, y.length / 10 | 0);
  const mean = (from, to) => { const v = Array.from(y.slice(from, to)).filter(Number.isFinite); return v.reduce((a, b) => a + b, 0) / v.length; };
  return tile("change over the last tenth", difference(mean(-count, undefined) - mean(-2 * count, -count)), [`since step ${whole(x[Math.max(0, y.length - count)])}`]);
}

function speed() {
  const { runs } = state;
  const find = (run) => ["tokens_per_second", "tokens_per_sec", "samples_per_second", "throughput"].map((name) =>
    run.columns.find((c) => c.name === name && !c.dataset)).find(Boolean);
  const column = find(runs[0]);
  if (column) {
    const rest = runs.slice(1).map((run) => { const c = find(run); return c && `${run.letter} ${shown(recent(c).mean)}`; }).filter(Boolean);
    return [tile(column.name.replaceAll("_", " "), shown(recent(column).mean), [rest.slice(0, 3).join(" · ") || pace(runs[0])])];
  }
  return runs[0].secondsPerStep ? [tile("step time", seconds(runs[0].secondsPerStep), [pace(runs[0], true)])] : [];
}

const seconds = (s) => s >= 7200 ? trimmed((s / 3600).toPrecision(3)) + " h" : s >= 120 ? trimmed((s / 60).toPrecision(3)) + " min" : s >= 1 ? trimmed(s.toPrecision(3)) + " s" : trimmed((s * 1000).toPrecision(3)) + " ms";

function pace(run, short) {
  if (!run.secondsPerStep) return "";
  const left = run.header.total_steps - run.lastStep;
  return [short ? "" : seconds(run.secondsPerStep) + " per step", left > 0 ? `${seconds(left * run.secondsPerStep)} to go` : ""].filter(Boolean).join(", ");
}

function trouble() {
  const alerts = state.runs.flatMap((run) => run.alerts.map((alert) => ({ run, ...alert })));
  const severe = alerts.filter((alert) => alert.severity === "severe");
  const bad = state.runs.flatMap((run) => run.columns.filter((c) => c.bad).map((c) => ({ run, c })));
  const who = (run) => run.letter ? run.letter + " " : "";
  bad.sort((a, b) => (isLoss(b.c.name) - isLoss(a.c.name)) || (b.c.dataset !== "") - (a.c.dataset !== ""));
  const where = ({ dataset, name }) => [dataset, name].filter(Boolean).join(" ");
  const said = ({ run, c }) => `${who(run)}${where(c)}`;
  const when = ({ c }) => `at step ${whole(c.bad[1])}` + (c.bad[0] > 1 ? ` and ${whole(c.bad[0] - 1)} times more` : "");
  const also = bad.slice(1, 4).map(said).join(", ") + (bad.length > 4 ? ` and ${bad.length - 4} more` : "");
  if (!alerts.length && !bad.length) return tile("alerts", "none", ["and every value is finite"]);
  if (!alerts.length) return tile("not finite", said(bad[0]), [when(bad[0]), also && `also ${also}`], "bad");
  const last = (severe.length ? severe : alerts).at(-1);
  const title = `${alerts.length} ${alerts.length === 1 ? "alert" : "alerts"}` + (severe.length ? `, ${severe.length} severe` : "");
  return tile(title, who(last.run) + (where(last) || `step ${whole(last.step)}`), [`step ${whole(last.step)}: ${last.message}`, bad.length > 0 && `not finite: ${said(bad[0])} ${when(bad[0])}`], severe.length || bad.length ? "bad" : "warn");
}

function notes() {
  const open = new Set([...document.querySelectorAll("details.note[open]")].map((d) => d.dataset.what));
  const parts = [];
  const alerts = state.runs.flatMap((run) => run.alerts.map((alert) => ({ run, ...alert }))).sort((a, b) => b.step - a.step);
  if (alerts.length)
    parts.push(folded("alerts", `${alerts.length} ${alerts.length === 1 ? "alert" : "alerts"}`, open,
      el("table", {}, el("thead", {}, el("tr", {}, ...[state.runs.length > 1 && "run", "step", "", "what"].filter((t) => t !== false).map((text) => el("th", { class: "text", scope: "col", text })))),
        el("tbody", {}, ...alerts.slice(0, 500).map((alert) => el("tr", {},
          ...(state.runs.length > 1 ? [el("td", { text: alert.run.letter })] : []),
          el("td", {}, el("button", { type: "button", class: "series", title: "zoom to it", text: whole(alert.step), onclick: () => zoomAbout(alert.step) })),
          el("td", { class: "text " + (alert.severity === "severe" ? "severe" : "warning"), text: alert.severity ?? "" }),
          el("td", { class: "text", dir: "auto", text: alert.message ?? "" })))))));
  $("notes").replaceChildren(...parts);
  $("settings").replaceChildren(folded("runs", state.runs.length > 1 ? "Runs and their settings" : "The run and its settings", open, settings()));
}

function folded(what, title, open, content) {
  const made = el("details", { class: "note", open: open.has(what) }, el("summary", { text: title }), el("div", { class: "scroll", tabindex: "0" }, content));
  made.dataset.what = what;
  return made;
}

/** The settings that differ between the first two runs, as far as there is room. */
function changedSettings() {
  const [a, b] = state.runs.map((run) => flat(run.header.config ?? {}));
  const names = [...new Set([...a.keys(), ...b.keys()])].filter((name) => a.get(name) !== b.get(name));
  return names.slice(0, 2).map((name) => `${name} ${a.get(name) ?? "–"} → ${b.get(name) ?? "–"}`).join(", ") +
    (names.length > 2 ? ` and ${names.length - 2} more settings` : "");
}

function flat(value, prefix = "", into = new Map()) {
  if (value && typeof value === "object" && !Array.isArray(value))
    for (const [name, one] of Object.entries(value)) flat(one, prefix ? `${prefix}.${name}` : name, into);
  else into.set(prefix, typeof value === "string" ? value : JSON.stringify(value));
  return into;
}

function settings() {
  const lists = state.runs.map((run) => {
    const { config, better, step, wall_time: started, ...header } = run.header;
    return new Map([["file", run.path], ["logs", whole(run.records)], ["last step", run.lastStep == null ? "" : whole(run.lastStep)],
      ["began", started ? moment(started) + (step ? ` at step ${whole(step)}` : "") : ""], ["last log", run.lastTime ? moment(run.lastTime) : ""], ...flat(header), ...flat(config ?? {})]);
  });
  const names = [...new Set(lists.flatMap((list) => [...list.keys()]))];
  return el("table", {},
    state.runs.length > 1 ? el("thead", {}, el("tr", {}, el("th"), ...state.runs.map((run) => el("th", { class: "text", scope: "col", text: `${run.letter} ${run.label}` })))) : null,
    el("tbody", {}, ...names.map((name) => {
      const own = lists.map((list) => list.get(name) ?? "–");
      const differs = new Set(own).size > 1;
      return el("tr", { class: differs ? "near" : "" }, el("th", { class: "text", scope: "row" }, named(name)), ...own.map((text) => el("td", { class: "text", dir: "auto", text })));
    })));
}

// -- The whole ------------------------------------------------------------------------------------------------

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const { card } = entry.target;
    card.seen = entry.isIntersecting;
    if (card.seen) { card.drawNow(); card.showCursor(state.cursor); }
  }
}, { rootMargin: "250px" });

function cardOf(panel, size) {
  if (panel.kind === "map") return new Grid(panel, size);
  if (panel.kind === "strip" || panel.kind === "heat") return new Strip(panel, size);
  return new Lines(panel, size);
}

/** Panels and their sizes, in rows of three small ones or two wide ones, so that no row but the last has a hole. */
function flowed(panels) {
  const small = panels.filter((panel) => panel.kind === "lines" && panel.series.length === 1);
  const wide = panels.filter((panel) => !small.includes(panel));
  const rest = small.length % 3, halves = rest === 0 ? 0 : rest === 2 ? 2 : small.length > 1 ? 4 : 1;
  const sized = small.map((panel, i) => [panel, i >= small.length - halves ? "half" : ""]);
  const odd = (wide.length + (halves === 1 ? 1 : 0)) % 2;
  sized.push(...wide.map((panel, i) => [panel, odd && i === wide.length - 1 ? "wide row" : "wide"]));
  if (odd && !wide.length) sized.at(-1)[1] = "row";
  return sized;
}

function layOut() {
  const closed = new Set([...document.querySelectorAll("details.group:not([open])")].map((d) => d.dataset.group));
  const opened = new Set([...document.querySelectorAll("details.more[open]")].map((d) => d.dataset.group));
  for (const card of cards) { watcher.unobserve(card.root); card.destroy(); }
  cards = [];
  const add = (panel, to, size) => { const card = cardOf(panel, size); card.mark(); cards.push(card); to.append(card.root); };
  const charts = $("charts"), parts = [];
  if (state.main) { const first = el("div", { class: "grid" }); add(state.main, first, "large"); parts.push(first); }
  for (const [prefix, panels] of grouped()) {
    const inside = el("div", { class: "grid" });
    const group = el("details", { class: "group", open: !closed.has(prefix) }, el("summary", {}, named(prefix || "no prefix"),
      el("small", { text: `${panels.length} ${panels.length === 1 ? "chart" : "charts"}` })), inside);
    group.dataset.group = prefix;
    const more = panels.filter(isMore), plain = panels.filter((panel) => !isMore(panel));
    const few = more.length <= 2 ? [...plain, ...more] : plain;
    for (const [panel, size] of flowed(few)) add(panel, inside, size);
    if (few === plain && more.length) {
      const rest = el("div", { class: "grid" });
      const fold = el("details", { class: "more", open: opened.has(prefix) }, el("summary", { text: `${more.length} more: ${[...new Set(more.map((p) => p.statistic || p.dataset))].slice(0, 6).join(", ")}` }), rest);
      fold.dataset.group = prefix;
      for (const [panel, size] of flowed(more)) add(panel, rest, size);
      inside.append(fold);
    }
    parts.push(group);
  }
  if (!parts.length) parts.push(el("p", { class: "notice", text: "Nothing has been logged yet." }));
  charts.replaceChildren(...parts);
  applyFilter();
  for (const card of cards) watcher.observe(card.root);
}

function take(payload) {
  const before = signature();
  modelled(payload);
  const now = signature();
  if (state.range && state.range[0] > state.full[1]) state.range = RANGE_ALL;  // these steps are gone
  if (state.smooth === null) setSmooth(usualSmoothing());
  heading();
  tiles();
  notes();
  if (now !== before) layOut();
  else {
    const byId = new Map(state.panels.map((panel) => [panel.id, panel]));
    for (const card of cards) renew(card, byId.get(card.panel.id));
    refreshAll();
  }
}

/** Give a card the newer data of its panel. */
function renew(card, panel) {
  card.panel = panel;
  card.scale = null;
  for (const row of card.rows ?? []) row.list = panel.series.filter(row.shows);
  if (card.slider) {
    const atEnd = card.slider.value === card.slider.max;
    card.slider.max = panel.map.x.length - 1;
    if (atEnd) card.slider.value = card.slider.max;
  }
}

const signature = () => JSON.stringify([state.runs.length, state.panels.map((panel) => [panel.id,
  panel.series?.map((one) => [one.run, one.row]), panel.heats?.map((heat) => heat.dataset),
  panel.map && [panel.map.axes, panel.map.x.length > 1]])]);

function heading() {
  const { runs } = state;
  $("which").replaceChildren(...runs.map((run, r) => {
    const parts = [named(run.label)];
    if (runs.length > 1) parts.unshift(swatch({ colour: runs.length > 1 ? "fg" : "c0", dash: DASHES[r % DASHES.length], width: 1.6 }), el("b", { text: run.letter }));
    return el("span", { title: run.path }, ...parts);
  }));
  document.title = runs.map((run) => run.label).join(", ") + " · metricfold";
  const last = Math.max(...runs.map((run) => run.lastStep ?? 0)), total = runs[0].header.total_steps;
  state.progress = "step " + whole(last) + (total ? ` of ${whole(total)}` : "") +
    (runs.some((run) => run.lastTime) ? ", " + moment(Math.max(...runs.map((run) => run.lastTime ?? 0))) : "");
  say();
  $("others").hidden = runs.length < 2;
  $("about").textContent = "Values have five digits, and of long curves some thousand points are drawn, with all extremes and what is not finite. metricfold export has every value.";
}

function say(problem) {
  $("status").textContent = [problem, state.progress, LIVE && !problem ? (state.paused ? "paused" : "live") : ""].filter(Boolean).join(" · ");
  $("status").classList.toggle("bad", Boolean(problem));
}

function refreshAll() { for (const card of cards) card.refresh(); }

let cursorAsked = false;
function moveCursor(step) {
  state.cursor = step;
  if (cursorAsked) return;
  cursorAsked = true;
  requestAnimationFrame(() => { cursorAsked = false; for (const card of cards) if (card.seen) card.showCursor(state.cursor); });
}

function zoom(range) {
  if (range) {
    const [low, high] = state.full;
    let [from, to] = range;
    if (!(to > from)) return;
    const width = Math.min(high - low, to - from);
    from = clamp(from, low, high - width);
    to = from + width;
    range = width >= (high - low) * 0.9999 ? RANGE_ALL : [from, to];
  }
  state.range = range;
  $("reset").disabled = !range;
  for (const card of cards) card.applyRange();
}

function zoomAbout(step) {
  const [low, high] = state.full, half = (high - low) / 20;
  zoom([step - half, step + half]);
  cards[0]?.root.scrollIntoView({ block: "nearest" });
}

function zoomBy(factor) {
  const [low, high] = currentRange(), middle = state.cursor != null && state.cursor >= low && state.cursor <= high ? state.cursor : (low + high) / 2;
  zoom([middle - (middle - low) * factor, middle + (high - middle) * factor]);
}

function pan(share) {
  const [low, high] = currentRange(), by = (high - low) * share;
  zoom([low + by, high + by]);
}

/** Move the cursor of all charts by `by` logs of the first one. */
function stepCursor(by) {
  const card = cards.find((one) => one.seen && one.chart);
  if (!card) return;
  const { chart } = card, grid = chart.data[0];
  const from = state.cursor == null ? lastUpTo(grid, currentRange()[1]) : lastUpTo(grid, state.cursor) + by;
  const place = clamp(from, 0, grid.length - 1);
  const [low, high] = currentRange();
  if (grid[place] < low || grid[place] > high) pan(grid[place] < low ? -0.25 : 0.25);
  state.source = chart;
  chart.setCursor({ left: chart.valToPos(grid[place], "x"), top: chart.over.clientHeight / 2 });
  moveCursor(grid[place]);
}

function applyFilter() {
  const wanted = state.filter.toLowerCase();
  for (const card of cards) {
    const { panel } = card;
    const text = [titleOf(panel), ...(panel.rowsShown ?? [])].join(" ").toLowerCase();
    card.root.hidden = wanted !== "" && !text.includes(wanted);
  }
  for (const group of document.querySelectorAll("details.group, details.more")) {
    group.hidden = ![...group.querySelectorAll(".card")].some((card) => !card.hidden);
  }
}

function setTheme(dark) {
  state.dark = dark;
  colours = {};
  document.documentElement.classList.toggle("dark", dark);
  $("theme").textContent = dark ? "light" : "dark";
  for (const card of cards) card.refresh();
}

function setSmooth(value) {
  state.smooth = clamp(value, 0, 0.99);
  $("smooth").value = state.smooth;
  $("smooth-value").textContent = state.smooth ? state.smooth.toFixed(2) : "off";
  refreshSoon();
}

/** About a hundredth of the run. */
function usualSmoothing() {
  const logs = Math.max(0, ...(state.main?.series ?? []).map(({ column }) => column.count));
  return Math.round(100 * clamp(1 - 100 / Math.max(logs, 1), 0.6, 0.98)) / 100;
}

let refreshAsked = false;
function refreshSoon() {
  if (refreshAsked) return;
  refreshAsked = true;
  requestAnimationFrame(() => { refreshAsked = false; refreshAll(); });
}

function toggle(id) {
  const now = $(id).getAttribute("aria-pressed") !== "true";
  $(id).setAttribute("aria-pressed", String(now));
  return now;
}

function focusCard(by) {
  const shownCards = cards.filter((card) => card.root.offsetParent);
  if (!shownCards.length) return;
  const current = shownCards.findIndex((card) => card.root.contains(document.activeElement));
  const card = shownCards[clamp(current < 0 ? 0 : current + by, 0, shownCards.length - 1)];
  card.enlarge.focus({ preventScroll: true });
  card.root.scrollIntoView({ block: "center" });
}

const focusedCard = () => cards.find((card) => card.root.contains(document.activeElement)) ?? cards.find((card) => card.root.matches(":hover"));

// Every control by key; the help shows this list.
const KEYS = [
  ["[  ]", "smooth less, more", { "[": () => setSmooth(state.smooth - 0.05), "]": () => setSmooth(state.smooth + 0.05) }],
  ["0", "smoothing off, and on again", { 0: () => { if (state.smooth) { state.smoothBefore = state.smooth; setSmooth(0); } else setSmooth(state.smoothBefore ?? 0.9); } }],
  ["l", "logarithmic values", { l: () => $("log").click() }],
  ["o", "leave outliers out of the scale", { o: () => $("outliers").click() }],
  ["c", "show the other runs", { c: () => $("others").hidden || $("others").click() }],
  ["+  -", "zoom in, out", { "+": () => zoomBy(0.5), "=": () => zoomBy(0.5), "-": () => zoomBy(2) }],
  ["←  →", "earlier, later steps", { ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2) }],
  [",  .", "cursor to the log before, after", { ",": () => stepCursor(-1), ".": () => stepCursor(1) }],
  ["r", "all steps", { r: () => zoom(RANGE_ALL) }],
  ["j  k", "next chart, the one before", { j: () => focusCard(1), k: () => focusCard(-1) }],
  ["e", "enlarge the chart", { e: () => focusedCard()?.toggleFull() }],
  ["1 … 9", "hide or show a curve of the chart", Object.fromEntries("123456789".split("").map((digit) => [digit, () => toggleNth(+digit - 1)]))],
  ["a", "show all curves", { a: () => { state.hidden.clear(); refreshAll(); } }],
  ["/", "filter charts by name", { "/": () => $("filter").focus() }],
  ["d", "dark or light", { d: () => $("theme").click() }],
  ["p", "stop following, follow again", { p: () => $("pause").hidden || $("pause").click() }],
  ["?", "these keys", { "?": () => $("help").open ? $("help").close() : $("help").showModal() }],
];
const actions = Object.assign({}, ...KEYS.map(([, , own]) => own));

function toggleNth(n) {
  const card = [focusedCard(), cards[0]].find((one) => one?.rows?.length);
  const row = card?.rows[n];
  if (row) toggleRow(card.panel, row.key, false);
}

function listen() {
  $("smooth").addEventListener("input", () => setSmooth(+$("smooth").value));
  $("log").addEventListener("click", () => { state.log = toggle("log"); refreshAll(); });
  $("outliers").addEventListener("click", () => { state.outliers = toggle("outliers"); refreshAll(); });
  $("others").addEventListener("click", () => { state.others = toggle("others"); refreshAll(); });
  $("reset").addEventListener("click", () => zoom(RANGE_ALL));
  $("theme").addEventListener("click", () => setTheme(!state.dark));
  $("keys").addEventListener("click", () => $("help").showModal());
  $("pause").addEventListener("click", () => { state.paused = toggle("pause"); say(); });
  $("filter").addEventListener("input", () => { state.filter = $("filter").value; applyFilter(); });
  $("help-keys").append(el("tbody", {}, ...KEYS.map(([keys, what]) => el("tr", {},
    el("td", {}, ...keys.split(/\s+/).flatMap((key) => key === "…" ? [" … "] : [el("kbd", { text: key }), " "])), el("td", { text: what })))));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches?.("input[type=search], select, textarea");
    if (event.key === "Escape" && event.target === $("filter")) { $("filter").value = state.filter = ""; applyFilter(); $("filter").blur(); return; }
    if (event.key === "Escape" && !$("help").open) { const card = cards.find((one) => one.full); card?.toggleFull(); return; }
    if (typing || event.target.matches?.("input[type=range]") && event.key.startsWith("Arrow")) return;
    if ($("help").open && event.key !== "?") return;
    const action = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
    if (action) { event.preventDefault(); action(); }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches));
  new ResizeObserver(() => { for (const card of cards) if (card.seen) card.resize(); else card.dirty = true; }).observe($("charts"));
  let wasDark = false;
  addEventListener("beforeprint", () => {
    wasDark = state.dark;
    document.body.style.width = "1040px";
    state.dark = false;
    colours = {};
    document.documentElement.classList.remove("dark");
    for (const card of cards) { card.dirty = true; card.drawNow(); card.chart?.redraw(false); }
  });
  addEventListener("afterprint", () => { document.body.style.width = ""; setTheme(wasDark); });
}

function failed(error) {
  $("charts").replaceChildren(el("p", { class: "notice", role: "alert", text: error }));
}

/** Ask for newer data for ever; what was read stays on the page while there is none. */
async function follow(version) {
  let wait = 1000;
  for (;;) {
    await new Promise((done) => setTimeout(done, wait));
    if (state.paused || document.hidden && !window.metricfold.always) continue;
    try {
      const answer = await fetch(`${LIVE}?have=${encodeURIComponent(version)}`, { cache: "no-store" });
      if (answer.status === 403 || answer.status === 404) throw new Error("the server is another one now: open its address anew");
      const problem = answer.headers.get("X-Problem");
      if (answer.status === 200) {
        version = answer.headers.get("X-Version");
        wait = clamp(+answer.headers.get("X-Wait") || 1000, 200, 60000);
        take(decoded(await answer.arrayBuffer()));
      }
      say(problem ? decodeURIComponent(problem) : "");
    } catch (error) {
      say(error instanceof TypeError ? "metricfold view does not answer: was it stopped?" : error.message);
      wait = Math.min(15000, wait * 1.5);
    }
  }
}

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  listen();
  window.metricfold = { state, get cards() { return cards; }, KEYS, smoothed, drawAll: () => { for (const card of cards) { card.seen = true; card.drawNow(); } }, take, decoded, embedded };
  if (LIVE) {
    const answer = await fetch(LIVE, { cache: "no-store" });
    $("pause").hidden = false;
    take(decoded(await answer.arrayBuffer()));
    follow(answer.headers.get("X-Version"));
  } else {
    if (typeof DecompressionStream === "undefined")
      return failed("This browser is too old to unpack the data of this page (it needs DecompressionStream: Chrome 80, Safari 16.4, Firefox 113 or later).");
    take(decoded(await embedded()));
  }
  window.metricfold.ready = true;
}

start().catch((error) => { failed("The page could not be drawn: " + error.message); throw error; });
})();
