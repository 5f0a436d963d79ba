"use strict";
// Shows the tasks of a round one by one, in an order of this rater's own; answers stay in the browser until they are
// saved to a file, or go to the server that the page came from.
const round = JSON.parse(document.getElementById("round").textContent);
const main = document.querySelector("main");
const isServed = round.served;
const storageKey = "lora-gpt2 rating " + round.id;
let state = load();

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(storageKey));
    if (kept && Array.isArray(kept.order)) return kept;
  } catch (error) { /* storage may be forbidden: the page then forgets when it is closed */ }
  return begin();
}

function begin() {
  const places = round.tasks.map((_, place) => place);
  return { rater: "", order: shuffle([...places]), swaps: places.map(() => Math.random() < 0.5), answers: {}, unsent: [] };
}

function keep() {
  try { localStorage.setItem(storageKey, JSON.stringify(state)); } catch (error) { /* as above */ }
}

function shuffle(items) {
  for (let last = items.length - 1; last > 0; last -= 1) {
    const place = Math.floor(Math.random() * (last + 1));
    [items[last], items[place]] = [items[place], items[last]];
  }
  return items;
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const isPair = round.mode === "pairwise";
const title = isPair ? "Which text is better?" : "How good is the text?";
document.title = `${title} · lora-gpt2`;
const choices = isPair ? [["left", "Text 1"], ["tie", "equally good"], ["right", "Text 2"]] : [1, 2, 3, 4, 5].map((n) => [String(n), String(n)]);

function isSwapped(task) { return isPair && state.swaps[task]; }

function toValue(task, choice) {
  if (!isPair) return Number(choice);
  if (choice === "tie") return "tie";
  return (choice === "left") !== isSwapped(task) ? "first" : "second";
}

function countDone() {
  return round.tasks.filter((_, task) => round.criteria.every((c) => state.answers[task] && state.answers[task][c])).length;
}

function list() {
  const found = [];
  for (const [task, given] of Object.entries(state.answers)) {
    for (const [criterion, choice] of Object.entries(given)) {
      found.push({ rater: state.rater, task: round.tasks[task].number, criterion, value: toValue(Number(task), choice) });
    }
  }
  return found;
}

function save() {
  const blob = new Blob([JSON.stringify({ round: round.id, answers: list() }, null, 1)], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(blob), download: `answers-${state.rater.replace(/[^\w-]+/g, "-")}.json` });
  link.click();
  URL.revokeObjectURL(link.href);
  state.saved = list().length;
  keep();
}

// Answers that are in this browser alone.
function countUnsaved() {
  if (list().length === state.saved) return 0;
  return isServed ? state.unsent.length : list().length - (state.saved ?? 0);
}

// What could not be sent waits, and goes with the next answer or at the end.
async function send(answers) {
  if (!isServed) return;
  state.unsent.push(...answers);
  keep();
  const body = JSON.stringify({ round: round.id, answers: state.unsent });
  const response = await fetch("answers", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (!response.ok) throw new Error((await response.json()).error.message);
  state.unsent = [];
  keep();
}

function heading() {
  const done = countDone();
  const bar = element("progress", { max: round.tasks.length, value: done });
  bar.setAttribute("aria-label", "tasks done");
  return [element("h1", { textContent: title }), element("p", { className: "quiet", textContent: `${done} of ${round.tasks.length} done. Who wrote what is hidden, and the order is random.` }), bar];
}

function showStart() {
  const name = element("input", { type: "text", id: "rater", maxLength: 60, value: state.rater, autocomplete: "off" });
  const begin = element("button", { className: "main", textContent: "Begin" });
  const form = element("form", { className: "card" }, element("label", { htmlFor: "rater", textContent: "Your name or a sign of your own: " }), name, element("p", { className: "quiet", textContent: `You will judge ${round.criteria.join(", ")}. You can stop at any time and go on later in this browser.` }), element("div", { className: "actions" }, begin));
  const problem = element("p", { className: "quiet" });
  problem.setAttribute("role", "alert");
  form.append(problem);
  let warned = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const rater = name.value.trim(), known = warned === rater ? 0 : await countAnswers(rater);
    if (known) {
      warned = rater;
      problem.textContent = `${rater} has given ${known} answers already, which yours would replace. Take another name, or press Begin again if that is you.`;
      return;
    }
    state.rater = rater;
    if (rater) { keep(); showNext(); }
  });
  main.replaceChildren(...heading(), form);
  name.focus();
}

// How many answers of this name the server has: of somebody else, or from another browser.
async function countAnswers(rater) {
  if (!isServed || Object.keys(state.answers).length) return 0;
  try {
    const { raters } = await (await fetch("raters")).json();
    return Object.hasOwn(raters, rater) ? raters[rater] : 0;
  } catch (error) {
    return 0;  // it is said when an answer is sent
  }
}

function showNext(from = 0) {
  const open = state.order.slice(from).find((task) => !round.criteria.every((c) => state.answers[task] && state.answers[task][c]));
  if (open === undefined) showEnd(); else showTask(open);
}

function showTask(place) {
  const task = round.tasks[place];
  const texts = isSwapped(place) ? [...task.texts].reverse() : task.texts;
  const cards = texts.map((text, number) => element("section", { className: "card" }, element("h2", { textContent: isPair ? `Text ${number + 1}` : "Text" }), element("div", { className: "text" }, element("span", { className: "prompt", textContent: task.prompt }), text)));
  const given = { ...state.answers[place] };
  const fields = round.criteria.map((criterion) => {
    const field = element("fieldset", {}, element("legend", { textContent: criterion }));
    for (const [value, label] of choices) {
      const input = element("input", { type: "radio", name: criterion, value, checked: given[criterion] === value });
      input.addEventListener("change", () => { given[criterion] = value; next.disabled = !round.criteria.every((c) => given[c]); });
      field.append(element("label", {}, input, label));
    }
    return field;
  });
  const next = element("button", { className: "main", textContent: "Next", disabled: !round.criteria.every((c) => given[c]) });
  const later = element("button", { textContent: "Skip for now" });
  const stop = element("button", { textContent: isServed ? "Stop" : "Save and stop" });
  const problem = element("p", { className: "quiet" });
  problem.setAttribute("role", "alert");
  next.onclick = async () => {
    next.disabled = true;
    state.answers[place] = given;
    keep();
    try {
      await send(round.criteria.map((criterion) => ({ rater: state.rater, task: task.number, criterion, value: toValue(place, given[criterion]) })));
      showNext();
    } catch (error) {
      problem.textContent = `Not sent: ${error.message}. It is kept here and sent again with the next one.`;
      next.textContent = "Go on";
      next.disabled = false;
      next.onclick = () => showNext();
    }
  };
  later.addEventListener("click", () => showNext(state.order.indexOf(place) + 1));
  stop.addEventListener("click", () => { if (!isServed) save(); showEnd(); });
  const hint = element("p", { className: "quiet", textContent: isPair ? "" : "1 is bad, 5 is very good." });
  main.replaceChildren(...heading(), element("div", { className: "texts" }, ...cards), ...fields, hint, problem, element("div", { className: "actions" }, next, later, stop));
  window.scrollTo(0, 0);
}

async function showEnd() {
  let advice = "Save your answers and send the file back: rate --import FILE.";
  if (isServed) {
    try {
      if (state.unsent.length) await send([]);
      advice = "Your answers have arrived.";
    } catch (error) {
      advice = `${state.unsent.length} answers are not sent: ${error.message}. Save them to a file instead.`;
    }
  }
  const left = round.tasks.length - countDone();
  const unsaved = countUnsaved();
  const text = left ? `${left} are left; you can go on later.` : unsaved ? "All judged." : "All done. Thank you.";
  const again = element("button", { textContent: "Go on", disabled: !left });
  again.addEventListener("click", () => showNext());
  const other = element("button", { textContent: "Another rater" });
  other.addEventListener("click", () => {
    if (countUnsaved() && !confirm(`${countUnsaved()} answers of ${state.rater} are in this browser alone, and would be lost. Begin anew?`)) return;
    state = begin();
    keep();
    showStart();
  });
  const file = element("button", { className: "main", textContent: "Save answers" });
  file.addEventListener("click", () => { save(); showEnd(); });
  main.replaceChildren(...heading(), element("p", { textContent: text }), element("p", { textContent: advice }), element("div", { className: "actions" }, file, again, other));
}

if (state.rater) showNext(); else showStart();
