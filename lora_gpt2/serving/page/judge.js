// What was judged while the names were hidden: the best text, or marks from 1 to 5.

import { $, element, say } from "./dom.js";
import { revealLast } from "./history.js";
import { CRITERIA } from "./result.js";

// It goes to the server, with the texts.
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

export function revealAll(results) {
  for (const result of results) result.reveal();
  revealLast();
}

export function offerChoice(results) {
  for (const result of results) {
    result.offer("This is the best", () => {
      result.card.classList.add("best");
      revealAll(results);
      keepJudgement(results, { chosen: result.pinned }).then((kept) => say(`${result.label} was chosen${kept}`));
      result.card.focus();
    });
  }
}

export function offerMarks(results) {
  for (const result of results) result.offerMarks();
  const done = element("button", { type: "button", className: "done", textContent: "Record the marks and show who wrote what" });
  done.addEventListener("click", () => {
    if (!results.some((result) => Object.keys(result.marks).length)) return say("give one mark at least", "error");
    revealAll(results);
    for (const result of results) {
      for (const field of result.card.querySelectorAll(".marks")) field.disabled = true;
    }
    done.remove();
    results[0].card.focus();
    const marks = Object.fromEntries(CRITERIA.map((criterion) => [criterion, results.map((result) => result.marks[criterion] ?? null)]));
    keepJudgement(results, { marks }).then((kept) => say(`marked${kept}`));
  });
  $("results").after(done);
}
