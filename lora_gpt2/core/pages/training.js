"use strict";
// The page of a run: what each adapter is doing, curves, speed, memory and samples. The finished report has the data
// inside it; a live page gets them over server-sent events. Text of users only ever enters the document as text.
// Charts are drawn here and not by a library, because a report is one small file that lasts.

const $ = (id) => document.getElementById(id);
const main = document.querySelector("main");
const isLive = Boolean(main.dataset.events);
const NO_CURVES = { points: [], open: null, validations: [] };
const AT_WORK = ["training", "measuring"];
let data = JSON.parse($("run").textContent);
let selected = null;
let rows = {};
let charts = [];
let seen = [];

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function draw(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Numbers

function format(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 4 });
}

function formatSeconds(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
}

function perplexity(loss) {
  const value = Math.exp(Math.min(loss, 700));
  return loss == null ? "" : value >= 1000 ? format(value) : value.toFixed(2);
}

// Curves: [x, y] pairs out of rows

function curvesOf(name) {
  return data.curves[name] ?? NO_CURVES;
}

function pointsOf(name) {
  const { points, open } = curvesOf(name);
  return open ? [...points, open] : points;
}

function column(name, key) {
  const at = data.columns.indexOf(key);
  return pointsOf(name).filter((row) => row[at] != null).map((row) => [row[0], row[at]]);
}

function measured(name, key) {
  const at = data.measured.indexOf(key);
  return curvesOf(name).validations.filter((row) => row[at] != null).map((row) => [row[0], row[at]]);
}

function smooth(points) {
  const half = Math.max(1, Math.floor(points.length / 40));
  const sums = [0];
  for (const [, y] of points) sums.push(sums.at(-1) + y);
  return points.map(([x], i) => {
    const from = Math.max(0, i - half), to = Math.min(points.length, i + half + 1);
    return [x, (sums[to] - sums[from]) / (to - from)];
  });
}

function speeds(name) {
  const points = pointsOf(name), stride = Math.max(1, Math.floor(points.length / 40));
  const found = [];
  for (let i = 0; i + stride < points.length; i += stride) {
    const [, tokens, seconds] = points[i], [step, moreTokens, moreSeconds] = points[i + stride];
    if (moreSeconds > seconds) found.push([step, (moreTokens - tokens) / (moreSeconds - seconds)]);
  }
  return found;
}

function lastStep(name) {
  return pointsOf(name).at(-1)?.[0] ?? curvesOf(name).validations.at(-1)?.[0] ?? 0;
}

function best(points) {
  return points.reduce((found, point) => (found == null || point[1] < found[1] ? point : found), null);
}

// Charts

function listTicks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) ticks.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return ticks;
}

class Chart {
  // `listLines` returns {label, look, points, marked} for each line; looks are classes of the style sheet.
  constructor(title, unit, listLines, { fromZero = false } = {}) {
    Object.assign(this, { title, unit, listLines, fromZero, at: null });
    this.picture = draw("svg", { role: "img", tabindex: 0 });
    this.readout = element("p", { className: "readout" });
    this.legend = element("p", { className: "legend" });
    this.figure = element("figure", {}, element("figcaption", {}, element("b", { textContent: title }), ` ${unit}`), this.picture, this.legend, this.readout);
    this.picture.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.picture.addEventListener("pointerleave", () => this.show(null));
    this.picture.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) this.show(Math.min(this.steps.length - 1, Math.max(0, (this.at ?? (move > 0 ? -1 : this.steps.length)) + move)));
      if (event.key === "Escape") this.show(null);
      if (move) event.preventDefault();
    });
  }

  update() {
    this.lines = this.listLines().filter((line) => line.points.length);
    this.figure.hidden = !this.lines.some((line) => line.label);
    if (this.figure.hidden) return;
    const width = Math.max(240, this.figure.clientWidth), height = Math.round(Math.min(340, Math.max(190, width * 0.58)));
    const all = this.lines.flatMap((line) => line.points);
    const named = this.lines.filter((line) => line.label);
    this.steps = [...new Set(named.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
    let [low, high] = [Infinity, -Infinity];
    for (const [, y] of all) [low, high] = [Math.min(low, y), Math.max(high, y)];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    [low, high] = [this.fromZero ? 0 : low - room, high + room];
    const right = all.reduce((most, [x]) => Math.max(most, x), 1);
    const left = 52, bottom = height - 26;
    this.x = (value) => left + (value / right) * (width - left - 12);
    this.y = (value) => bottom - ((value - low) / (high - low)) * (bottom - 8);
    this.scale = { width, height, left, bottom };
    const parts = [];
    for (const tick of listTicks(low, high, 4)) {
      parts.push(draw("line", { class: "grid", x1: left, x2: width - 12, y1: this.y(tick), y2: this.y(tick) }));
      parts.push(draw("text", { x: left - 6, y: this.y(tick) + 4, "text-anchor": "end" }, format(tick)));
    }
    for (const tick of listTicks(0, right, Math.max(2, width / 130)).filter(Number.isInteger)) {
      const anchor = this.x(tick) > width - 30 ? "end" : "middle";
      parts.push(draw("text", { x: anchor === "end" ? width - 2 : this.x(tick), y: height - 8, "text-anchor": anchor }, tick.toLocaleString("en")));
    }
    for (const line of this.lines) parts.push(...this.drawLine(line));
    this.cursor = draw("line", { class: "cursor", y1: 8, y2: bottom, visibility: "hidden" });
    this.picture.replaceChildren(...parts, this.cursor);
    for (const [key, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) this.picture.setAttribute(key, value);
    this.picture.setAttribute("aria-label", `${this.title}${this.unit ? `, ${this.unit}` : ""}: ${named.map((line) => this.tell(line)).join("; ")}. Arrow keys read it step by step.`);
    this.legend.replaceChildren(...(named.length > 1 ? named.map(({ label, look }) => element("span", { className: look, textContent: label })) : []));
    this.show(this.at == null ? null : Math.min(this.at, this.steps.length - 1));
  }

  drawLine({ points, look, marked }) {
    const path = points.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
    const parts = [draw("path", { class: look, d: path })];
    if (marked || points.length === 1) parts.push(...points.map(([x, y]) => draw("circle", { class: look, cx: this.x(x), cy: this.y(y), r: 3 })));
    if (marked) {
      const [x, y] = best(points);
      parts.push(draw("circle", { class: `${look} best`, cx: this.x(x), cy: this.y(y), r: 7 }));
    }
    return parts;
  }

  tell({ label, points }) {
    return `${label} from ${format(points[0][1])} to ${format(points.at(-1)[1])} at step ${points.at(-1)[0].toLocaleString("en")}`;
  }

  point(pixels) {
    const distance = (index) => Math.abs(this.x(this.steps[index]) - pixels);
    let found = 0;
    for (let index = 1; index < this.steps.length; index += 1) if (distance(index) <= distance(found)) found = index;
    this.show(found);
  }

  show(at) {
    this.at = at;
    if (at == null) {
      this.cursor?.setAttribute("visibility", "hidden");
      const ends = this.lines.find((line) => line.marked) ?? this.lines.find((line) => line.label);
      const end = ends.marked ? best(ends.points) : ends.points.at(-1);
      this.readout.textContent = ends.marked ? `best: ${format(end[1])} (perplexity ${perplexity(end[1])}), step ${end[0].toLocaleString("en")}` : `now ${format(end[1])}`;
      if (!(isLive && isRunning()) && !ends.marked) this.readout.textContent = `at the end ${format(end[1])}`;
      return;
    }
    const step = this.steps[at];
    this.cursor.setAttribute("visibility", "visible");
    for (const key of ["x1", "x2"]) this.cursor.setAttribute(key, this.x(step));
    const said = this.lines.filter((line) => line.label).flatMap((line) => line.points.filter(([x]) => x === step).map(([, y]) => `${line.label} ${format(y)}`));
    this.readout.textContent = `step ${step.toLocaleString("en")}: ${said.join(", ")}`;
  }
}

function buildCharts() {
  const names = data.run.adapters.map(({ name }) => name);
  const own = (key, scale = 1) => () => [{ label: key.replaceAll("_", " "), look: "train", points: column(selected, key).map(([x, y]) => [x, y * scale]) }];
  charts = [
    new Chart("loss", "nats per token", () => {
      const losses = column(selected, "loss");
      return [
        { look: "faint", points: losses },
        { label: "training (mean of neighbours)", look: "train", points: smooth(losses) },
        { label: "validation", look: "validation", points: measured(selected, "validation_loss"), marked: true },
      ];
    }),
    new Chart("learning rate", "", own("learning_rate"), { fromZero: true }),
    new Chart("speed", "tokens per second", () => [{ label: "speed", look: "train", points: speeds(selected) }], { fromZero: true }),
    new Chart("divergence from the base on replayed text", "nats per token", own("divergence"), { fromZero: true }),
    new Chart("peak memory", "GB", () => [{ label: "memory", look: "train", points: measured(selected, "memory_bytes").map(([x, y]) => [x, y / 1e9]) }], { fromZero: true }),
  ];
  if (names.length > 1) {
    charts.push(new Chart("validation loss of all adapters", "nats per token", () => [
      ...names.filter((name) => name !== selected).map((name) => ({ look: "other", points: measured(name, "validation_loss") })),
      { label: selected, look: "validation", points: measured(selected, "validation_loss"), marked: true },
    ]));
  }
  $("charts").replaceChildren(...charts.map(({ figure }) => figure));
}

// The adapters, one line each

function stateOf(name) {
  return data.status.adapters?.[name] ?? ["waiting", ""];
}

function buildRows() {
  rows = {};
  const body = $("adapters").tBodies[0];
  body.replaceChildren();
  for (const { name, description } of data.run.adapters) {
    const choose = element("button", { type: "button", className: "name", textContent: name, title: description ?? "" });
    choose.addEventListener("click", () => select(name));
    choose.addEventListener("keydown", (event) => {
      const row = choose.closest("tr"), next = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
      if (next) next.querySelector(".name").focus();
      if (next) event.preventDefault();
    });
    const row = { choose, state: element("td", { className: "word" }), bar: element("progress", { max: 1, value: 0 }), steps: element("span"), loss: element("td", { className: "number" }), gain: element("td", { className: "number" }), line: draw("svg", { class: "spark", width: 96, height: 24, "aria-hidden": "true" }) };
    row.bar.setAttribute("aria-label", `progress of ${name}`);
    const cells = [element("td", {}, choose), row.state, element("td", { className: "steps" }, row.bar, row.steps), row.loss, row.gain, element("td", { className: "roomy" }, row.line)];
    if (isLive) {
      row.stop = element("button", { type: "button", textContent: "Stop", title: "Its training ends; what it has learnt is kept" });
      row.stop.setAttribute("aria-label", `Stop and keep ${name}`);
      row.stop.addEventListener("click", () => stop(name));
      cells.push(element("td", {}, row.stop));
    }
    rows[name] = row;
    body.append(element("tr", {}, ...cells));
  }
  $("list").hidden = data.run.adapters.length < 2;
}

function updateRow({ name, num_steps }) {
  const row = rows[name], [state, detail] = stateOf(name), step = lastStep(name);
  const losses = measured(name, "validation_loss");
  row.choose.setAttribute("aria-current", String(name === selected));
  row.state.textContent = { published: `${detail}${describeStop(name)}`, unchanged: `${detail}, needs no training` }[state] ?? state;
  row.state.className = `word state ${state}`;
  row.state.title = detail;
  row.bar.value = step / Math.max(1, num_steps);
  row.bar.hidden = state === "unchanged" || !num_steps;
  row.steps.textContent = row.bar.hidden ? "" : `${step.toLocaleString("en")} of ${num_steps.toLocaleString("en")}`;
  row.loss.textContent = smooth(column(name, "loss")).at(-1)?.[1].toFixed(2) ?? "";
  row.gain.textContent = losses.length ? `${perplexity(losses[0][1])} → ${perplexity(best(losses)[1])}` : "";
  const ys = losses.map(([, y]) => y), low = Math.min(...ys), high = Math.max(...ys);
  const path = losses.map(([x, y], i) => `${i ? "L" : "M"}${2 + (x / num_steps) * 92} ${22 - ((y - low) / (high - low || 1)) * 20}`).join("");
  row.line.replaceChildren(draw("path", { class: "validation", d: path }));
  if (row.stop) row.stop.hidden = state !== "training" || !isRunning();
}

// An adapter may be published before its last step: stopped here, or by its patience.
function describeStop(name) {
  const { num_steps } = data.run.adapters.find((adapter) => adapter.name === name), step = lastStep(name);
  return step < num_steps ? ` (stopped at step ${step.toLocaleString("en")} of ${num_steps.toLocaleString("en")})` : "";
}

// Above them

function isRunning() {
  return data.status.state === "training";
}

function describeRun() {
  const counts = {};
  for (const { name } of data.run.adapters) counts[stateOf(name)[0]] = (counts[stateOf(name)[0]] ?? 0) + 1;
  const few = data.run.adapters.length === 1 ? Object.keys(counts)[0] : Object.entries(counts).map(([state, count]) => `${count} ${state}`).join(", ");
  const words = { done: counts.failed ? `finished, ${counts.failed} failed` : "finished", stopped: "stopped", failed: "failed", killed: "killed", waiting: "waiting", training: few }[data.status.state] ?? "begins";
  const published = data.run.adapters.filter(({ name }) => stateOf(name)[0] === "published").map(({ name }) => `${stateOf(name)[1]}${describeStop(name)}`);
  const shown = published.length > 8 ? `${published.length} adapters` : published.join(", ");
  const more = [data.status.state === "done" && shown ? `published ${shown}` : "", data.status.message].filter(Boolean);
  return [words, ...more].join(": ");
}

// Tokens per second by the clock on the wall, over the last minute that this page has seen; null before it can tell.
function measureRate(done) {
  const now = performance.now() / 1000;
  if (seen.length && done < seen.at(-1)[1]) seen = [];
  if (!seen.length || now > seen.at(-1)[0] + 1) seen.push([now, done]);
  while (seen.length > 1 && seen[1][0] < now - 60) seen.shift();
  const [time, before] = seen[0];
  return now - time > 5 ? (done - before) / (now - time) : null;
}

function listFigures() {
  let left = 0, skipped = 0, done = 0, memory = 0;
  for (const { name, num_steps, tokens_per_step } of data.run.adapters) {
    const [state] = stateOf(name), step = lastStep(name);
    if (state === "unchanged") continue;
    done += step * tokens_per_step;
    if (["training", "waiting"].includes(state)) left += (num_steps - step) * tokens_per_step;
    if (["published", "measuring"].includes(state)) skipped += (num_steps - step) * tokens_per_step;
    for (const [, bytes] of measured(name, "memory_bytes")) memory = Math.max(memory, bytes);
  }
  const losses = measured(selected, "validation_loss"), rate = measureRate(done);
  const figures = [[`${Math.floor((100 * done) / Math.max(1, done + left + skipped))} %`, "of all tokens"]];
  if (data.run.adapters.length === 1) {
    const [{ name, num_steps }] = data.run.adapters;
    figures.push([`${lastStep(name).toLocaleString("en")} of ${num_steps.toLocaleString("en")}`, "steps"]);
  }
  if (isRunning() && rate && left) figures.push([formatSeconds(left / rate), "left"]);
  if (isRunning() && rate) figures.push([format(rate), "tokens per second, measuring included"]);
  if (memory) figures.push([`${(memory / 1e9).toFixed(2)} GB`, "peak memory of the process"]);
  if (losses.length) figures.push([`${perplexity(losses[0][1])} → ${perplexity(best(losses)[1])}`, `validation perplexity of ${selected}, first and best`]);
  return figures;
}

function updateHead() {
  const state = describeRun(), quiet = data.status.quiet_seconds;
  if ($("state").textContent !== state) $("state").textContent = state;  // a screen reader says what changes
  $("state").dataset.state = data.status.state ?? "";
  if (isLive) $("quiet").textContent = isRunning() && quiet > 60 ? `nothing was written for ${formatSeconds(quiet)}: it is measuring, waits, or was killed on another machine` : "";
  const figures = listFigures();
  $("figures").replaceChildren(...figures.map(([value, label]) => element("div", {}, element("b", { textContent: value }), element("span", { textContent: label }))));
  if (isLive) document.title = `${isRunning() ? figures[0][0] : data.status.state} · ${$("title").textContent}`;
  if (!isLive) return;
  $("stop-all").hidden = !isRunning();
  if (!isRunning()) $("asked").textContent = "";
}

function updateSamples() {
  const at = data.measured.indexOf("sample");
  const found = curvesOf(selected).validations.filter((row) => row[at]).map((row) => [row[0], perplexity(row[1]), row[at]]);
  const shown = isLive ? found.reverse() : found;
  const cells = ([step, value, text]) => [element("td", { className: "number", textContent: step.toLocaleString("en") }), element("td", { className: "number", textContent: value }), element("td", { className: "sample", textContent: text })];
  $("samples").tBodies[0].replaceChildren(...shown.map((each) => element("tr", {}, ...cells(each))));
  $("written").hidden = !shown.length;
}

function update() {
  data.run.adapters.forEach(updateRow);
  const none = stateOf(selected)[0] === "unchanged" ? " (none in this run)" : "";
  $("of").textContent = data.run.adapters.length > 1 ? `of ${selected}${none}` : "";
  charts.forEach((chart) => chart.update());
  if ($("state")) updateHead();
  updateSamples();
}

function select(name) {
  selected = name;
  update();
}

function begin() {
  const names = data.run.adapters.map(({ name }) => name);
  if (!names.includes(selected)) selected = names.find((name) => AT_WORK.includes(stateOf(name)[0])) ?? names.find((name) => pointsOf(name).length) ?? names[0];
  if ($("state")) {
    $("title").textContent = names.length === 1 ? names[0] : `${names.length} adapters`;
    $("lead").textContent = `${data.run.kind === "tune" ? "a search, " : ""}base ${data.run.base} on ${data.run.device} in ${data.run.dtype}, begun ${new Date(data.run.started).toLocaleString()}`;
  }
  buildRows();
  buildCharts();
  update();
  const box = $("adapters").parentElement;
  box.scrollTop = rows[selected].choose.closest("tr").offsetTop - box.clientHeight / 2;
}

// What comes from the server, and what goes there

function receive(message) {
  if (message.run) {
    data = message;
    return begin();
  }
  data.status = message.status;
  for (const [name, { points, open, validations }] of Object.entries(message.curves)) {
    const known = (data.curves[name] ??= structuredClone(NO_CURVES));
    known.points.push(...points);
    known.validations.push(...validations);
    known.open = open;
  }
  update();
}

async function stop(name) {
  const all = name === null;
  if (!confirm(all ? "Stop all training and keep what was learnt? Each adapter is measured and published." : `Stop ${name} and keep it? It is measured and published; the others go on.`)) return;
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  try {
    const answer = await fetch(main.dataset.stop, { method: "POST", headers, body: JSON.stringify({ adapter: name }) });
    const said = answer.ok ? "" : (await answer.json()).error.message;
    $("asked").textContent = said || (all ? "All adapters stop after this step." : `${name} stops after this step.`);
    $("needs-key").hidden = answer.status !== 401;
    if (answer.status === 401) $("key").focus();
  } catch (error) {
    $("asked").textContent = `that was not asked for: ${error.message}`;
  }
}

function listen() {
  const events = new EventSource(main.dataset.events);
  events.onmessage = (event) => { $("lost").hidden = true; receive(JSON.parse(event.data)); };
  events.onerror = () => { $("lost").hidden = false; };
  $("stop-all").addEventListener("click", () => stop(null));
}

if (isLive) listen();
else begin();
let drawnWidth = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width !== drawnWidth) charts.forEach((chart) => chart.update());
  drawnWidth = contentRect.width;
}).observe($("charts"));
