"use strict";
// The page of `evaluate --tokens`: each token coloured by what an adapter gains on it, or by how likely it is, and the
// sums over all documents. Text of users only ever enters the document as text.

const $ = (id) => document.getElementById(id);
const BASE = "base";
const FULL = { gain: 4, logprob: 10 }; // nats at which a colour is full
const LINE_END = "↵";
const data = JSON.parse($("run").textContent);
const adapters = data.rows.filter((row) => row !== BASE);
let marked = null;
let pointer = "";

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function format(value, digits = 2) {
  return value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

function signed(value) {
  return value == null ? "–" : `${value < 0 ? "−" : "+"}${format(Math.abs(value))}`;
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return logprob == null ? "–" : value >= 0.01 || !value ? `${value.toPrecision(2)} %` : `${value.toExponential(0)} %`;
}

function perplexity(nats) {
  return nats == null ? "–" : format(Math.exp(nats));
}

function minus(left, right) {
  return left == null || right == null ? null : left - right;
}

// What is chosen

const text = () => data.texts[$("text").selectedIndex];
const adapter = () => $("adapter").value || BASE;
const gainOf = (name) => minus(text().sums[name].base, text().sums[name].adapter) ?? -Infinity;
const view = () => (adapters.length ? $("view").value : "logprob");

function figuresOf({ logprobs }, index) {
  const base = logprobs[BASE]?.[index] ?? null, own = logprobs[adapter()]?.[index] ?? null;
  return { base, own, gain: minus(own, base) };
}

function colour({ own, gain }) {
  const value = view() === "gain" ? gain : own;
  const strength = Math.min(1, Math.abs(value ?? 0) / FULL[view()]);
  const look = view() === "logprob" ? "rare" : value > 0 ? "better" : "worse";
  return `color-mix(in srgb, var(--${look}) ${Math.round(60 * strength)}%, transparent)`;
}

// The text

function showDocument(item) {
  const shown = element("div", { className: "document" });
  if (item.prompt) shown.append(element("span", { className: "prompt", textContent: item.prompt }));
  item.pieces.forEach((piece, index) => {
    const isBlank = !piece.trim();
    const span = element("span", { textContent: isBlank ? piece.replaceAll("\n", `${LINE_END}\n`) : piece });
    span.style.backgroundColor = colour(figuresOf(item, index));
    Object.assign(span, { item, index });
    shown.append(span);
  });
  return shown;
}

function point(span) {
  marked?.classList.remove("marked");
  marked = span;
  if (!span) return ($("readout").textContent = "");
  span.classList.add("marked");
  const { base, own, gain } = figuresOf(span.item, span.index);
  const parts = [JSON.stringify(span.item.pieces[span.index]), `base ${percent(base)}`];
  if (adapters.length) parts.push(`${adapter()} ${percent(own)}`, `gain ${signed(gain)} nats`);
  else parts.push(`log-probability ${signed(own)} nats`);
  $("readout").textContent = parts.join(" · ");
}

function move(by) {
  const spans = [...$("documents").querySelectorAll("span:not(.prompt)")];
  const at = marked ? spans.indexOf(marked) + by : by > 0 ? 0 : spans.length - 1;
  const next = spans[Math.min(spans.length - 1, Math.max(0, at))];
  point(next);
  next?.scrollIntoView({ block: "nearest" });
}

function showLegend() {
  const shown = view() === "gain"
    ? [["worse", `${FULL.gain} nats or more worse than the base`], ["better", `${FULL.gain} nats or more better`]]
    : [["rare", `${FULL.logprob} nats or more: ${percent(-FULL.logprob)} or less`]];
  const samples = shown.map(([look, label]) => {
    const sample = element("span", { textContent: label });
    sample.style.backgroundColor = `color-mix(in srgb, var(--${look}) 60%, transparent)`;
    return sample;
  });
  $("legend").replaceChildren(...samples);
}

// The sums

function fill(table, rows) {
  const lines = rows.map((cells) => {
    const line = element("tr");
    cells.forEach((cell, index) => line.append(element("td", { className: index ? "number" : "sample", textContent: cell })));
    return line;
  });
  $(table).tBodies[0].replaceChildren(...lines);
}

function showSums() {
  const { sums, tokens, documents } = text();
  const own = sums[adapter()];
  $("sums").hidden = !own;
  if (!own) return;
  const [base, mine] = [own.base, own.adapter];
  const cards = [
    [tokens.toLocaleString("en"), `tokens of ${documents.toLocaleString("en")} document${documents > 1 ? "s" : ""}`],
    [perplexity(base), "perplexity of the base"],
    [perplexity(mine), `perplexity of ${adapter()}`],
    [signed(minus(base, mine)), "nats gained per token"],
  ];
  $("figures").replaceChildren(...cards.map(([value, label]) => element("div", {}, element("b", { textContent: value }), element("span", { textContent: label }))));
  for (const span of document.querySelectorAll(".change")) span.textContent = base < mine ? "loss" : "gain";
  fill("kinds", own.kinds.map(([kind, count, base, mine, share]) => [kind, count.toLocaleString("en"), format(base), format(mine), share == null ? "–" : `${format(100 * share, 0)} %`]));
  for (const table of ["gains", "losses"]) {
    fill(table, own[table].map(([word, count, all, each]) => [word, count.toLocaleString("en"), signed(all), signed(each)]));
  }
}

function show() {
  point(null);
  const { shown, documents } = text();
  $("shown").textContent = shown.length < documents ? `The first ${shown.length.toLocaleString("en")} of ${documents.toLocaleString("en")} documents.` : "";
  $("documents").replaceChildren(...shown.map(showDocument));
  showLegend();
  showSums();
}

// Each choice is offered where there is one

$("text").append(...data.texts.map(({ source }) => element("option", { textContent: source })));
$("adapter").append(...adapters.map((name) => element("option", { textContent: name })));
$("adapter").value = adapters.toSorted((left, right) => gainOf(right) - gainOf(left))[0] ?? "";
$("texts").hidden = data.texts.length < 2;
$("adapters").hidden = adapters.length < 2;
$("views").hidden = !adapters.length;
for (const id of ["text", "adapter", "view"]) $(id).addEventListener("change", show);
$("documents").addEventListener("pointermove", (event) => {
  const here = `${event.clientX} ${event.clientY}`;
  if (here === pointer) return; // the page was scrolled below it
  pointer = here;
  if (event.target.item && event.target !== marked) point(event.target);
});
$("documents").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) move(by);
  if (event.key === "Escape") point(null);
  if (by) event.preventDefault();
});
show();
