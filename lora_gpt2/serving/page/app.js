// The page of one prompt and up to four continuations. Text only ever enters the document as text.

const MOST = 4;
const MOST_KEPT = 50;  // of the history
const SLIDERS = ["temperature", "top_k", "top_p", "max_tokens"];
const CRITERIA = ["coherence", "relevance", "fluency", "style"];
const KEY = "lora-gpt2 session";
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
  recall();
}

function recall() {
  try {
    ({ past, at } = JSON.parse(sessionStorage.getItem(KEY)) ?? { past, at });
  } catch { /* storage may be forbidden */ }
  showHistory();
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
  constructor(model, prompt, seed, hiddenName) {
    Object.assign(this, { model, prompt, seed, label: model, isHidden: Boolean(hiddenName) });
    this.count = 0;
    this.nats = 0;
    this.tokens = [];
    this.name = element("span", { textContent: hiddenName || model });
    this.note = element("span", { className: "quiet" });
    this.text = element("pre", {}, element("span", { className: "prompt", textContent: prompt }));
    this.readout = element("p", { className: "readout", hidden: true });
    this.origin = element("p", { className: "origin", hidden: this.isHidden });
    this.tools = element("div", { className: "tools", hidden: true });
    this.card = element("article", { tabIndex: -1 }, element("h2", {}, this.name, this.note), this.text, this.readout, this.origin, this.tools);
    $("results").append(this.card);
  }

  get written() {
    return this.text.textContent.slice(this.prompt.length);
  }

  add(choice, colours) {
    const scores = choice.logprobs;
    if (!scores) return void this.text.append(choice.text);
    for (const logprob of scores.token_logprobs) {
      this.count += 1;
      this.nats -= logprob;
    }
    if (!colours || scores.tokens.some((token) => token.startsWith("bytes:"))) this.text.append(choice.text);  // part of a character
    else for (const [index, token] of scores.tokens.entries()) this.addToken(token, scores.token_logprobs[index], scores.top_logprobs?.[index]);
    if (this.count) this.note.textContent = `perplexity ${format(Math.exp(this.nats / this.count))}`;
  }

  addToken(token, logprob, top) {
    const span = element("span", { className: colourOf(logprob), textContent: token });
    const others = Object.entries(top ?? {}).filter(([other]) => other !== token).sort((a, b) => b[1] - a[1]).slice(0, 4);
    const share = (value) => `${(100 * Math.exp(value)).toFixed(value > -7 ? 1 : 3)} %`;
    const more = others.map(([other, value]) => `${JSON.stringify(other)} ${share(value)}`).join(", ");
    this.tokens.push({ span, said: `${JSON.stringify(token)} had ${share(logprob)} (${(-logprob).toFixed(2)} nats)${more ? `; others: ${more}` : ""}` });
    const index = this.tokens.length - 1;
    span.addEventListener("pointerenter", () => this.tell(index));
    this.text.append(span);
  }

  // What the model thought of a token, also by keyboard: the arrow keys go from one to the next.
  tell(index) {
    this.tokens[this.told]?.span.classList.remove("told");
    this.told = Math.min(this.tokens.length - 1, Math.max(0, index));
    this.tokens[this.told].span.classList.add("told");
    this.readout.textContent = this.tokens[this.told].said;
  }

  offerTokens() {
    if (!this.tokens.length) return;
    this.readout.hidden = false;
    this.readout.textContent = "Point at a token, or use the arrow keys on the text.";
    Object.assign(this.text, { tabIndex: 0 });
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `Tokens of ${this.name.textContent}`);
    this.readout.setAttribute("aria-live", "polite");
    this.text.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) this.tell((this.told ?? -1) + move);
      if (move) event.preventDefault();
    });
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

  offerMarks() {
    this.marks = {};
    for (const criterion of CRITERIA) {
      const field = element("fieldset", { className: "marks" }, element("legend", { textContent: criterion }));
      for (const mark of [1, 2, 3, 4, 5]) {
        const input = element("input", { type: "radio", name: `${criterion} ${this.name.textContent}`, value: mark });
        input.addEventListener("change", () => { this.marks[criterion] = mark; });
        field.append(element("label", {}, input, String(mark)));
      }
      this.tools.before(field);
    }
  }

  fail(error) {
    this.failure = error.message;
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
    if (routes.length) this.label = `${this.model} → ${routes.map((route) => route.adapter === "base" ? "base" : `${route.adapter} (${Math.round(100 * route.probability)} %)`).join(" → ")}`;
    if (!this.isHidden) this.name.textContent = this.label;
    this.origin.textContent = `${found.length ? `auto chose ${found.join(", then ")}; ` : ""}${parts}, seed ${origin.seed}`;
  }

  reveal() {
    this.isHidden = false;
    this.name.textContent = this.label;
    this.origin.hidden = false;
    this.tools.replaceChildren();
    this.offerTools();
  }

  toJson() {
    return { model: this.model, label: this.label, prompt: this.prompt, seed: this.seed, text: this.written, note: this.note.textContent, origin: this.origin.textContent, failure: this.failure };
  }
}

function showAgain(kept) {
  const result = new Result(kept.model, kept.prompt, kept.seed, "");
  result.label = kept.label;
  result.name.textContent = kept.label;
  result.text.append(kept.failure ? "" : kept.text);
  result.note.textContent = kept.note;
  result.origin.textContent = kept.origin;
  if (kept.failure) result.fail(new Error(kept.failure));
  else result.offerTools();
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

// What was judged while the names were hidden goes to the server, with the texts.
async function keepJudgement(results, more) {
  const models = results.map((result) => result.pinned);
  const body = JSON.stringify({ prompt: results[0].prompt, models, seed: results[0].seed, texts: results.map((result) => result.written), ...more });
  try {
    const answer = await fetch("v1/choices", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const command = `lora-gpt2 rate --recorded page${more.marks ? " --mode scale" : ""}`;
    return answer.ok && (await answer.json()).kept ? `; kept for '${command}'` : "; not kept";
  } catch {
    return "; not kept";
  }
}

function revealAll(results) {
  for (const result of results) result.reveal();
  if (past[at]) past[at].isHidden = false;
  showHistory();
}

function offerChoice(results) {
  for (const result of results) {
    result.offer("This is the best", () => {
      result.card.classList.add("best");
      revealAll(results);
      keepJudgement(results, { chosen: result.pinned }).then((kept) => say(`${result.label} was chosen${kept}`));
      result.card.focus();
    });
  }
}

function offerMarks(results) {
  for (const result of results) result.offerMarks();
  const done = element("button", { type: "button", className: "done", textContent: "Record the marks and show who wrote what" });
  done.addEventListener("click", () => {
    const given = results.some((result) => Object.keys(result.marks).length);
    revealAll(results);
    for (const result of results) {
      for (const field of result.card.querySelectorAll(".marks")) field.disabled = true;
    }
    done.remove();
    results[0].card.focus();
    if (!given) return say("no marks were given: nothing is recorded");
    const marks = Object.fromEntries(CRITERIA.map((criterion) => [criterion, results.map((result) => result.marks[criterion] ?? null)]));
    keepJudgement(results, { marks }).then((kept) => say(`marked${kept}`));
  });
  $("results").after(done);
}

// The history of this session; a reload does not lose it.

let past = [];
let at = -1;

function readForm() {
  return { prompt: $("prompt").value, chosen: chosen.slice(), mixes: $("mixes").checked, mix: $("mix").value, weights: { ...weights } };
}

function remember(form, results) {
  const isHidden = results.some((result) => result.isHidden);  // who wrote what is told by the judgement, not here
  past = [...past.slice(0, at + 1), { ...form, isHidden, results: results.map((result) => result.toJson()) }].slice(-MOST_KEPT);
  at = past.length - 1;
  showHistory();
}

function goBack(steps) {
  const isChanged = at >= 0 && $("prompt").value !== past[at].prompt;
  visit(steps < 0 && isChanged ? at : at + steps);  // what was typed since goes first
}

function visit(index) {
  const entry = past[index];
  if (!entry) return;
  running?.abort();
  running = null;
  at = index;
  entry.isHidden = false;
  $("prompt").value = entry.prompt;
  $("mixes").checked = entry.mixes;
  $("mix").value = entry.mix;
  Object.assign(weights, entry.weights);
  chosen = entry.chosen.filter((id) => order.includes(id));
  showChosen();
  clearResults();
  entry.results.forEach(showAgain);
  $("stop").disabled = true;
  say(`${index + 1} of ${past.length} in this session`);
  showHistory();
}

function showHistory() {
  $("undo").disabled = at < 0 || (at === 0 && $("prompt").value === past[0].prompt);
  $("redo").disabled = at + 1 >= past.length;
  $("session").hidden = !past.length;
  $("history").replaceChildren(...past.map((entry, index) => {
    const start = entry.prompt.trim().slice(-60) || "(nothing)";
    const names = entry.isHidden ? "not judged" : entry.results.map((result) => result.label).join(", ");
    const button = element("button", { type: "button", textContent: `${start} · ${names}` });
    if (index === at) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => visit(index));
    return element("li", {}, button);
  }));
  try { sessionStorage.setItem(KEY, JSON.stringify({ past, at })); } catch { /* it may be full or forbidden: the page then forgets at a reload */ }
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
  const form = readForm(), judged = $("judge").value, colours = $("colour").checked;
  const settings = Object.fromEntries(SLIDERS.map((id) => [id, Number($(id).value)]));
  settings.seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  if (colours) settings.logprobs = 5;
  const control = (running = new AbortController());
  clearResults();
  $("legend").hidden = !colours;
  $("stop").disabled = false;
  say("writing…");
  const started = performance.now();
  const results = (judged ? shuffle(models) : models).map((model, index) => new Result(model, form.prompt, settings.seed, judged ? `Text ${"ABCD"[index]}` : ""));
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
  else if (judged === "best" && results.length > 1) offerChoice(results);
  else if (judged) offerMarks(results);
}

$("form").addEventListener("submit", run);
$("mixes").addEventListener("change", showWeights);
$("stop").addEventListener("click", () => running?.abort());
$("undo").addEventListener("click", () => goBack(-1));
$("redo").addEventListener("click", () => goBack(1));
$("prompt").addEventListener("input", () => { $("undo").disabled = at < 0; });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
  if (event.key === "Escape") running?.abort();
});
for (const id of SLIDERS) $(id).addEventListener("input", showSettings);
showSettings();
loadAdapters().catch((error) => say(`the adapters cannot be listed: ${error.message}`, "error"));
