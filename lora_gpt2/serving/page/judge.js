// What was judged while the names were hidden: the best text, or marks from 1 to 5.

import { $, element, say } from "./dom.js";
import { revealLast } from "./history.js";
import { CRITERIA } from "./result.js";

// It goes to the server, with the texts; null where that does not answer. One version that wrote twice counts once.
async function keepJudgement(results, chosen, markOf) {
  const counted = results.filter((result, index) => results.findIndex(({ pinned }) => pinned === result.pinned) === index);
  const marks = markOf && Object.fromEntries(CRITERIA.map((criterion) => [criterion, counted.map((result) => markOf(result, criterion))]));
  if (chosen && counted.length < 2) return "; not kept: one version wrote all of them";
  const models = counted.map((result) => result.pinned), texts = counted.map((result) => result.written);
  const body = JSON.stringify({ prompt: results[0].prompt, models, seed: results[0].seed, texts, ...(chosen ? { chosen } : { marks }) });
  let answer;
  try {
    answer = await fetch("v1/choices", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  } catch {
    say("the server does not answer: nothing is kept yet, and the names stay hidden; try again", "error");
    return null;
  }
  const found = await answer.json();
  if (!answer.ok) return `; not kept: ${found.error.message}`;
  return found.kept ? `; kept for 'lora-gpt2 rate --recorded page${marks ? " --mode scale" : ""}'` : "; not kept: the server keeps none";
}

export function revealAll(results) {
  for (const result of results) result.reveal();
  revealLast();
}

export function offerChoice(results) {
  for (const result of results) {
    result.offer("This is the best", async () => {
      const kept = await keepJudgement(results, result.pinned);
      if (kept === null) return;
      result.card.classList.add("best");
      revealAll(results);
      say(`${result.label} was chosen${kept}`);
      result.card.focus();
    });
  }
}

export function offerMarks(results) {
  for (const result of results) result.offerMarks();
  const done = element("button", { type: "button", className: "done", textContent: "Record the marks and show who wrote what" });
  done.addEventListener("click", async () => {
    if (!results.some((result) => Object.keys(result.marks).length)) return say("give one mark at least", "error");
    const kept = await keepJudgement(results, null, (result, criterion) => result.marks[criterion] ?? null);
    if (kept === null) return;
    revealAll(results);
    for (const result of results) {
      for (const field of result.card.querySelectorAll(".marks")) field.disabled = true;
    }
    done.remove();
    results[0].card.focus();
    say(`marked${kept}`);
  });
  $("results").after(done);
}
