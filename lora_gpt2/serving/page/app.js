// The page of one prompt and up to four continuations. Text only ever enters the document as text.

const MOST = 4;
const SLIDERS = ["temperature", "top_k", "top_p", "max_tokens"];
const $ = (id) => document.getElementById(id);
let chosen = ["base"];
let order = ["base"];  // of the cards, which the texts follow
const weights = {};
let running = null;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(text, state = "") {
  $("status").textContent = text;
  $("status").dataset.state = state;
}

function format(value) {
  return value == null ? "" : value >= 100 ? value.toFixed(0) : value.toFixed(1);
}

function describe(model) {
  if (model.id === "auto") return [model.description];
  if (model.id === "base") return [`${model.base}, without an adapter`];
  const lines = model.description ? [model.description] : [];
  const own = model.test_perplexity ?? model.validation_perplexity;
  const base = model.test_perplexity == null ? model.base_perplexity : model.base_test_perplexity;
  if (own != null && base != null) lines.push(`perplexity ${format(own)}, base ${format(base)}`);
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
  chosen = [order[1] ?? "base"];
  for (const model of data) {
    const card = element("button", { type: "button", className: "adapter" }, element("strong", { textContent: model.id }));
    for (const line of describe(model)) card.append(element("small", { textContent: line }));
    card.addEventListener("click", () => toggle(model.id));
    card.dataset.id = model.id;
    $("adapters").append(card);
  }
  showChosen();
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
  $("count").textContent = chosen.length ? `${chosen.length} of at most ${MOST}, side by side` : "none is chosen";
  showWeights();
}

function listMixed() {
  return chosen.filter((id) => id !== "base" && id !== "auto");
}

function showWeights() {
  const mixed = listMixed();
  $("weights").hidden = !$("mixes").checked || !mixed.length;
  $("weights").replaceChildren();
  for (const id of mixed) {
    const value = element("output", { value: (weights[id] ??= 1 / mixed.length).toFixed(2) });
    const slider = element("input", { type: "range", min: 0, max: 1.5, step: 0.05, value: weights[id] });
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
  const mix = mixed.map((id) => `${id}:${Number(weights[id].toFixed(2))}`).join("+");
  return [...chosen.filter((id) => !mixed.includes(id)), mix, ...(written ? [written] : [])];
}

function showSettings() {
  for (const id of SLIDERS) document.querySelector(`output[for=${id}]`).value = $(id).value;
  $("summary").textContent = SLIDERS.map((id) => `${id === "max_tokens" ? "length" : id.replace("_", "-")} ${$(id).value}`).join(", ");
}

function shuffle(items) {
  for (let last = items.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [items[last], items[other]] = [items[other], items[last]];
  }
  return items;
}

function colourOf(logprob) {
  const nats = -logprob;
  return nats > 8 ? "s4" : nats > 5 ? "s3" : nats > 3 ? "s2" : nats > 1 ? "s1" : "s0";
}

class Result {
  constructor(model, prompt, seed, isBlind, place) {
    Object.assign(this, { model, prompt, seed });
    this.count = 0;
    this.nats = 0;
    this.name = element("span", { textContent: isBlind ? `Text ${"ABCD"[place]}` : model });
    this.note = element("span", { className: "quiet" });
    this.text = element("pre", {}, element("span", { className: "prompt", textContent: prompt }));
    this.origin = element("p", { className: "origin", hidden: isBlind });
    this.tools = element("div", { className: "tools", hidden: true });
    this.card = element("article", { tabIndex: -1 }, element("h2", {}, this.name, this.note), this.text, this.origin, this.tools);
    $("results").append(this.card);
  }

  add(choice, colours) {
    const scores = choice.logprobs;
    if (!scores) return void this.text.append(choice.text);
    for (const [place, token] of scores.tokens.entries()) {
      this.count += 1;
      this.nats -= scores.token_logprobs[place];
      const isWhole = colours && !token.startsWith("bytes:");
      if (isWhole) this.text.append(element("span", { className: colourOf(scores.token_logprobs[place]), textContent: token,
        title: `${(-scores.token_logprobs[place]).toFixed(2)} nats` }));
    }
    if (!colours || scores.tokens.some((token) => token.startsWith("bytes:"))) this.text.append(choice.text);
    if (this.count) this.note.textContent = `perplexity ${format(Math.exp(this.nats / this.count))}`;
  }

  offer(label, act) {
    const button = element("button", { type: "button", textContent: label });
    button.addEventListener("click", () => act(button));
    this.tools.append(button);
    this.tools.hidden = false;
    return button;
  }

  offerTools() {
    this.offer("Copy", async (button) => {
      await navigator.clipboard.writeText(this.text.textContent);
      button.textContent = "Copied";
    });
    this.offer("Continue from here", () => {
      $("prompt").value = this.text.textContent;
      if (order.includes(this.model)) chosen = [this.model];
      showChosen();
      $("prompt").focus();
      $("prompt").setSelectionRange($("prompt").value.length, $("prompt").value.length);
      say(`the prompt is the text of ${this.model}`);
    });
  }

  fail(error) {
    this.note.textContent = "failed";
    this.card.classList.add("failed");
    this.text.append(element("span", { className: "problem", textContent: `\n${error.message}` }));
  }

  end(origin, reason) {
    if (!this.note.textContent) this.note.textContent = reason === "length" ? "" : "ended";
    if (!origin) return;
    const [only, ...more] = origin.adapters;  // the choice is of these versions, whatever is published later
    this.pinned = !only ? "base" : !more.length && only.weight === 1 ? only.adapter
      : origin.adapters.map((part) => `${part.adapter}:${part.weight}`).join("+");
    const parts = origin.adapters.map((part) => `${part.adapter} (${part.sha256.slice(0, 12)})`).join(" + ") || "no adapter";
    const routes = origin.auto?.[0] ?? [];
    const found = routes.map((route) => route.adapter === "base" ? "no adapter is clearly the one" : `${route.adapter}: ${Math.round(100 * route.probability)} % sure`);
    if (routes.length > 1) this.pinned = null;  // several wrote it: a vote is for none of them
    this.origin.textContent = `${found.length ? `auto chose ${found.join(", then ")}; ` : ""}${parts}, seed ${origin.seed}`;
  }

  reveal() {
    this.name.textContent = this.model;
    this.origin.hidden = false;
    this.tools.replaceChildren();
    this.offerTools();
  }
}

async function* readEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function write(result, prompt, settings, colours, signal) {
  const body = JSON.stringify({ model: result.model, prompt, stream: true, truncate: "left", ...settings });
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch("v1/completions", { method: "POST", headers, body, signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  let origin = null, reason = null;
  for await (const event of readEvents(answer)) {
    if (event.error) throw new Error(event.error.message);
    origin = event.provenance ?? origin;
    for (const choice of event.choices) {
      result.add(choice, colours);
      reason = choice.finish_reason ?? reason;
    }
  }
  result.end(origin, reason);
}

async function keepChoice(results, best) {
  const models = results.map((result) => result.pinned);
  const texts = results.map((result) => result.text.textContent.slice(result.prompt.length));
  const body = JSON.stringify({ prompt: best.prompt, models, chosen: best.pinned, seed: best.seed, texts });
  try {
    const answer = await fetch("v1/choices", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    return answer.ok && (await answer.json()).kept ? "; kept for 'lora-gpt2 rate --recorded page'" : "; not kept";
  } catch {
    return "; not kept";
  }
}

function offerChoice(results) {
  for (const result of results) {
    result.offer("This is the best", () => {
      result.card.classList.add("best");
      for (const each of results) each.reveal();
      keepChoice(results, result).then((kept) => say(`${result.model} was chosen${kept}`));
      result.card.focus();
    });
  }
}

async function run(event) {
  event?.preventDefault();
  running?.abort();
  const models = listModels();
  if (models.length > MOST) return say(`at most ${MOST} side by side, the mix counts too`, "error");
  if (!models.length) return say("choose an adapter, or the base", "error");
  const prompt = $("prompt").value, isBlind = $("blind").checked, colours = $("colour").checked;
  const settings = Object.fromEntries(SLIDERS.map((id) => [id, Number($(id).value)]));
  settings.seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  if (colours) settings.logprobs = 0;
  const control = (running = new AbortController());
  $("results").replaceChildren();
  $("legend").hidden = !colours;
  $("stop").disabled = false;
  say("writing…");
  const started = performance.now();
  const results = (isBlind ? shuffle(models) : models).map((model, place) => new Result(model, prompt, settings.seed, isBlind, place));
  const writing = results.map((result) => write(result, prompt, settings, colours, control.signal));
  const outcomes = await Promise.allSettled(writing);
  if (running !== control) return;
  $("stop").disabled = true;
  const failed = outcomes.find((outcome) => outcome.status === "rejected");
  for (const [place, outcome] of outcomes.entries()) {
    const stopped = outcome.status === "rejected" && outcome.reason.name === "AbortError";
    if (outcome.status === "rejected" && !stopped) results[place].fail(outcome.reason);
    else if (!isBlind || stopped) results[place].offerTools();
  }
  if (control.signal.aborted) say("stopped");
  else if (failed) say(failed.reason.message, "error");
  else say(`done in ${((performance.now() - started) / 1000).toFixed(1)} s`, "done");
  if (isBlind && !failed) offerChoice(results);
}

$("form").addEventListener("submit", run);
$("mixes").addEventListener("change", showWeights);
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
  if (event.key === "Escape") running?.abort();
});
for (const id of SLIDERS) $(id).addEventListener("input", showSettings);
showSettings();
loadAdapters().catch((error) => say(`the adapters cannot be listed: ${error.message}`, "error"));
