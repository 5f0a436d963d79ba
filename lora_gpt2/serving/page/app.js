// The page of one prompt and up to four continuations.

import { $, element, format, say, shuffle } from "./dom.js";
import { beginHistory, remember } from "./history.js";
import { offerChoice, offerMarks, revealAll } from "./judge.js";
import { Result, showAgain, write } from "./result.js";

const MOST = 4;
const SLIDERS = ["temperature", "top_k", "top_p", "max_tokens"];
let chosen = ["base"];
let order = ["base"];  // of the cards, which the texts follow
const weights = {};
let running = null;

function describe(model) {
  if (model.id === "auto") return [model.description];
  if (model.id === "base") return [`${model.base}, without an adapter`];
  const lines = model.description ? [model.description] : [];
  const own = model.test_perplexity ?? model.validation_perplexity;
  const base = model.test_perplexity == null ? model.base_perplexity : model.base_test_perplexity;
  const text = model.test_perplexity == null ? "validation" : "test";
  if (own != null && base != null) lines.push(`${text} perplexity ${format(own)}, base ${format(base)}`);
  lines.push(`version ${model.version}, ${(model.size_bytes / 1e6).toFixed(1)} MB`);
  return lines;
}

async function loadAdapters() {
  const answer = await fetch("v1/models");
  const { data } = await answer.json();
  $("base").textContent = `base ${data[0].base}, context of ${data[0].context} tokens`;
  $("max_tokens").max = Math.min(400, data[0].context - 1);
  showSettings();
  order = data.map((model) => model.id);
  const asked = new URLSearchParams(location.search).get("adapter");
  chosen = [order.includes(asked) ? asked : order[1] ?? "base"];
  for (const model of data) {
    const card = element("button", { type: "button", className: "adapter" }, element("strong", { textContent: model.id }));
    for (const line of describe(model)) card.append(element("small", { textContent: line }));
    card.addEventListener("click", () => toggle(model.id));
    card.dataset.id = model.id;
    $("adapters").append(card);
  }
  showChosen();
  beginHistory(restore);
}

function toggle(id) {
  if (chosen.includes(id)) chosen = chosen.filter((other) => other !== id);
  else if (chosen.length < MOST) chosen = order.filter((other) => other === id || chosen.includes(other));
  else return say(`at most ${MOST} side by side`, "error");
  say("");
  showChosen();
}

function showChosen() {
  for (const card of $("adapters").children) card.setAttribute("aria-pressed", String(chosen.includes(card.dataset.id)));
  showWeights();
}

function listMixed() {
  return chosen.filter((id) => id !== "base" && id !== "auto");
}

// Equal shares, until a slider is moved.
function weightOf(id, mixed) {
  return weights[id] ?? 1 / mixed.length;
}

function showWeights() {
  const mixed = listMixed(), isMix = $("mixes").checked && mixed.length > 1;
  $("count").textContent = !chosen.length ? "none is chosen" : isMix ? `${mixed.length} in one text` : `${chosen.length} of at most ${MOST}, side by side`;
  $("weights").hidden = !$("mixes").checked || !mixed.length;
  $("weights").replaceChildren();
  for (const id of mixed) {
    const value = element("output", { value: weightOf(id, mixed).toFixed(2) });
    const slider = element("input", { type: "range", min: 0, max: 1.5, step: 0.05, value: weightOf(id, mixed) });
    slider.addEventListener("input", () => {
      weights[id] = Number(slider.value);
      value.value = weights[id].toFixed(2);
    });
    $("weights").append(element("label", {}, id, value, slider));
  }
}

function listModels() {
  const written = $("mix").value.trim();
  const mixed = listMixed();
  if (!$("mixes").checked || mixed.length < 2) return written ? chosen.concat(written) : chosen.slice();
  const mix = mixed.map((id) => `${id}:${Number(weightOf(id, mixed).toFixed(2))}`).join("+");
  return [...chosen.filter((id) => !mixed.includes(id)), mix, ...(written ? [written] : [])];
}

function showSettings() {
  for (const id of SLIDERS) document.querySelector(`output[for=${id}]`).value = $(id).value;
  $("summary").textContent = SLIDERS.map((id) => `${id === "max_tokens" ? "length" : id.replace("_", "-")} ${$(id).value}`).join(", ");
}

function readForm() {
  return { prompt: $("prompt").value, chosen: chosen.slice(), mixes: $("mixes").checked, mix: $("mix").value, weights: { ...weights } };
}

function restore(entry, said) {
  running?.abort();
  running = null;
  $("prompt").value = entry.prompt;
  $("mixes").checked = entry.mixes;
  $("mix").value = entry.mix;
  for (const id of Object.keys(weights)) delete weights[id];
  Object.assign(weights, entry.weights);
  chosen = entry.chosen.filter((id) => order.includes(id));
  showChosen();
  clearResults();
  const results = entry.results.map((kept, index) => showAgain(kept, entry.isHidden ? nameText(index) : ""));
  if (entry.isHidden) offerJudgement(results, entry.judged);
  $("legend").hidden = true;
  $("stop").disabled = true;
  say(said);
}

function continueFrom(result) {
  $("prompt").value = result.text.textContent;
  if (order.includes(result.model)) chosen = [result.model];
  showChosen();
  $("prompt").focus();
  $("prompt").setSelectionRange($("prompt").value.length, $("prompt").value.length);
  $("undo").disabled = false;
  say(`the prompt is the text of ${result.model}`);
}

function clearResults() {
  $("results").replaceChildren();
  document.querySelector(".done")?.remove();
}

async function run(event) {
  event?.preventDefault();
  running?.abort();
  const models = listModels();
  if (models.length > MOST) return say(`at most ${MOST} side by side, the mix counts too`, "error");
  if (!models.length) return say("choose an adapter, or the base", "error");
  const judged = $("judge").value, form = { ...readForm(), judged }, colours = $("colour").checked;
  if (judged === "best" && models.length < 2) return say("choose two or more to compare them, or rate from 1 to 5", "error");
  const settings = Object.fromEntries(SLIDERS.map((id) => [id, Number($(id).value)]));
  settings.seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  if (colours) settings.logprobs = 5;
  const control = (running = new AbortController());
  clearResults();
  $("legend").hidden = !colours;
  $("stop").disabled = false;
  say("writing…");
  const started = performance.now();
  const results = (judged ? shuffle(models) : models).map((model, index) => new Result(model, form.prompt, settings.seed, judged ? nameText(index) : ""));
  const writing = results.map((result) => write(result, form.prompt, settings, colours, control.signal));
  const outcomes = await Promise.allSettled(writing);
  if (running !== control) return;
  $("stop").disabled = true;
  const failed = outcomes.find((outcome) => outcome.status === "rejected");
  for (const [index, outcome] of outcomes.entries()) {
    const isStopped = outcome.status === "rejected" && outcome.reason.name === "AbortError";
    if (outcome.status === "rejected" && !isStopped) results[index].fail(outcome.reason);
    else if (!judged || isStopped) results[index].offerTools();
    results[index].offerTokens();
  }
  if (control.signal.aborted) say("stopped");
  else if (failed) say(failed.reason.message, "error");
  else say(`done in ${((performance.now() - started) / 1000).toFixed(1)} s`, "done");
  remember(form, results);
  if (judged && failed) revealAll(results);
  else if (judged) offerJudgement(results, judged);
}

function nameText(index) {
  return `Text ${"ABCD"[index]}`;
}

function offerJudgement(results, judged) {
  if (judged === "best") offerChoice(results);
  else offerMarks(results);
}

$("form").addEventListener("submit", run);
$("form").addEventListener("invalid", () => { $("settings").open = true; }, true);  // so that what is wrong is seen
$("mixes").addEventListener("change", showWeights);
document.addEventListener("continue", (event) => continueFrom(event.detail));
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  if (event.key === "Escape") running?.abort();
});
for (const id of SLIDERS) $(id).addEventListener("input", showSettings);
showSettings();
$("prompt").setSelectionRange($("prompt").value.length, $("prompt").value.length);
loadAdapters().catch((error) => say(`the adapters cannot be listed: ${error.message}`, "error"));
