// The page of one prompt and up to four continuations. Text only ever enters the document as text.

const MOST = 4;
const SLIDERS = ["temperature", "top_k", "top_p", "max_tokens"];
const $ = (id) => document.getElementById(id);
let chosen = ["base"];
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
  chosen = data.slice(1, 3).map((model) => model.id).concat("base").slice(0, MOST);
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
  else if (chosen.length < MOST) chosen.push(id);
  else return say(`at most ${MOST} side by side`, "error");
  say("");
  showChosen();
}

function showChosen() {
  for (const card of $("adapters").children) card.setAttribute("aria-pressed", String(chosen.includes(card.dataset.id)));
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
    this.card = element("article", {}, element("h2", {}, this.name, this.note), this.text, this.origin);
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

  end(origin, reason) {
    if (!this.note.textContent) this.note.textContent = reason === "length" ? "" : "ended";
    if (!origin) return;
    const [only, ...more] = origin.adapters;  // the choice is of these versions, whatever is published later
    this.pinned = !only ? "base" : !more.length && only.weight === 1 ? only.adapter
      : origin.adapters.map((part) => `${part.adapter}:${part.weight}`).join("+");
    const parts = origin.adapters.map((part) => `${part.adapter} (${part.sha256.slice(0, 12)})`).join(" + ") || "no adapter";
    this.origin.textContent = `${parts}, seed ${origin.seed}`;
  }

  reveal() {
    this.name.textContent = this.model;
    this.origin.hidden = false;
    this.card.querySelector("button")?.remove();
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
  const body = JSON.stringify({ prompt: best.prompt, models, chosen: best.pinned, seed: best.seed });
  try {
    const answer = await fetch("v1/choices", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    return answer.ok && (await answer.json()).kept ? "; kept for 'lora-gpt2 rate --recorded page'" : "; not kept";
  } catch {
    return "; not kept";
  }
}

function offerChoice(results) {
  for (const result of results) {
    const button = element("button", { type: "button", textContent: "This is the best" });
    button.addEventListener("click", () => {
      result.card.classList.add("best");
      for (const each of results) each.reveal();
      keepChoice(results, result).then((kept) => say(`${result.model} was chosen${kept}`));
      result.card.focus?.();
    });
    result.card.append(button);
  }
}

async function run(event) {
  event?.preventDefault();
  running?.abort();
  const mix = $("mix").value.trim();
  const models = mix ? chosen.concat(mix) : chosen.slice();
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
  if (control.signal.aborted) say("stopped");
  else if (failed) say(failed.reason.message, "error");
  else say(`done in ${((performance.now() - started) / 1000).toFixed(1)} s`, "done");
  if (isBlind && !failed) offerChoice(results);
}

$("form").addEventListener("submit", run);
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
  if (event.key === "Escape") running?.abort();
});
for (const id of SLIDERS) $(id).addEventListener("input", showSettings);
showSettings();
loadAdapters().catch((error) => say(`the adapters cannot be listed: ${error.message}`, "error"));
