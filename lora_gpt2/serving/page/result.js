// One continuation: its text as it comes, what the model thought of each token, and what can be done with it.

import { $, element, format } from "./dom.js";

export const CRITERIA = ["coherence", "relevance", "fluency", "style"];

function colourOf(logprob) {
  const nats = -logprob;
  return nats > 8 ? "s4" : nats > 5 ? "s3" : nats > 3 ? "s2" : nats > 1 ? "s1" : "s0";
}

export class Result {
  constructor(model, prompt, seed, hiddenName) {
    Object.assign(this, { model, prompt, seed, label: model, isHidden: Boolean(hiddenName) });
    this.count = 0;
    this.nats = 0;
    this.tokens = [];
    this.name = element("span", { textContent: hiddenName || model });
    this.note = element("span", { className: "quiet" });
    this.text = element("pre", {}, element("span", { className: "prompt", textContent: prompt }));
    this.problem = element("p", { className: "problem", hidden: true });
    this.readout = element("p", { className: "readout", hidden: true });
    this.origin = element("p", { className: "origin", hidden: this.isHidden });
    this.tools = element("div", { className: "tools", hidden: true });
    this.card = element("article", { tabIndex: -1 }, element("h2", {}, this.name, this.note), this.text, this.problem, this.readout, this.origin, this.tools);
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
    if (this.count) this.figure = `perplexity ${format(Math.exp(this.nats / this.count))}`;
    if (this.count && !this.isHidden) this.note.textContent = this.figure;  // which would tell who wrote it
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
    this.readout.textContent = "Point at a token, or go from one to the next by the left and right arrow keys.";
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
    this.offer("Continue from here", () => document.dispatchEvent(new CustomEvent("continue", { detail: this })));
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
    Object.assign(this.problem, { hidden: false, textContent: error.message });
    if (this.written) this.offerTools();
  }

  end(origin, reason) {
    if (!this.note.textContent) this.note.textContent = reason === "length" ? "" : "ended";
    if (!origin) return;
    const [only, ...more] = origin.adapters;  // the choice is of these versions, whatever is published later
    this.pinned = !only ? "base" : !more.length && only.weight === 1 ? only.adapter
      : origin.adapters.map((part) => `${part.adapter}:${part.weight}`).join("+");
    const parts = origin.adapters.map((part) => `${part.adapter} (${part.sha256.slice(0, 12)})`).join(" + ") || "no adapter";
    const routes = origin.auto?.[0] ?? [];
    const found = routes.map((route) => route.adapter === "base" ? "the base, because no adapter is clearly the one" : `${route.adapter}, ${Math.round(100 * route.probability)} % sure`);
    const cut = Math.max(0, ...(origin.dropped_prompt_tokens ?? []));
    if (routes.length > 1) this.pinned = null;  // several wrote it: a vote is for none of them
    if (routes.length) this.label = `${this.model} → ${routes.map((route) => route.adapter === "base" ? "base" : `${route.adapter} (${Math.round(100 * route.probability)} %)`).join(" → ")}`;
    if (!this.isHidden) this.name.textContent = this.label;
    this.origin.textContent = `${found.length ? `auto chose ${found.join(", then ")}; ` : ""}${parts}, seed ${origin.seed}${cut ? `; the first ${cut.toLocaleString("en")} tokens of the prompt were not read` : ""}`;
  }

  reveal() {
    this.isHidden = false;
    this.name.textContent = this.label;
    this.note.textContent = this.figure ?? this.note.textContent;
    this.origin.hidden = false;
    this.tools.replaceChildren();
    this.offerTools();
  }

  toJson() {
    return { model: this.model, label: this.label, prompt: this.prompt, seed: this.seed, text: this.written, note: this.note.textContent, figure: this.figure, pinned: this.pinned, origin: this.origin.textContent, failure: this.failure };
  }
}

export function showAgain(kept, hiddenName) {
  const result = new Result(kept.model, kept.prompt, kept.seed, hiddenName);
  Object.assign(result, { label: kept.label, figure: kept.figure, pinned: kept.pinned });
  if (!hiddenName) result.name.textContent = kept.label;
  result.text.append(kept.text);
  result.note.textContent = kept.note;
  result.origin.textContent = kept.origin;
  if (kept.failure) result.fail(new Error(kept.failure));
  else if (!hiddenName) result.offerTools();
  return result;
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

export async function write(result, prompt, settings, colours, signal) {
  const body = JSON.stringify({ model: result.model, prompt, stream: true, truncate: "left", ...settings });
  const headers = { "Content-Type": "application/json" };
  try {
    await follow(result, await fetch("v1/completions", { method: "POST", headers, body, signal }), colours);
  } catch (error) {
    throw error instanceof TypeError ? new Error("the server does not answer; is it still running? Try again then") : error;
  }
}

async function follow(result, answer, colours) {
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
