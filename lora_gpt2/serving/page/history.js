// The history of this session; a reload does not lose it.

import { $, element } from "./dom.js";

const MOST_KEPT = 50;
const KEY = "lora-gpt2 session";
let past = [];
let at = -1;
let restore = () => {};

// `restoreEntry` shows an entry: the form, and its results.
export function beginHistory(restoreEntry) {
  restore = restoreEntry;
  try {
    ({ past, at } = JSON.parse(sessionStorage.getItem(KEY)) ?? { past, at });
  } catch { /* storage may be forbidden */ }
  showHistory();
}

export function remember(form, results) {
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
  at = index;
  restore(entry, `${index + 1} of ${past.length} in this session`);
  showHistory();
}

// Who wrote the texts is known now.
export function revealLast() {
  if (past[at]) past[at].isHidden = false;
  showHistory();
}

function showHistory() {
  $("undo").disabled = at < 0 || (at === 0 && $("prompt").value === past[0].prompt);
  $("redo").disabled = at + 1 >= past.length;
  $("session").hidden = !past.length;
  const items = past.map((entry, index) => {
    const start = entry.prompt.trim().slice(-60) || "(nothing)";
    const names = entry.isHidden ? "not judged" : entry.results.map((result) => result.label).join(", ");
    const button = element("button", { type: "button", textContent: `${start} · ${names}` });
    if (index === at) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => visit(index));
    return element("li", { value: index + 1 }, button);
  });
  $("history").replaceChildren(...items.reverse());  // the newest is at the top
  try { sessionStorage.setItem(KEY, JSON.stringify({ past, at })); } catch { /* it may be full or forbidden: the page then forgets at a reload */ }
}

$("undo").addEventListener("click", () => goBack(-1));
$("redo").addEventListener("click", () => goBack(1));
$("prompt").addEventListener("input", () => { $("undo").disabled = at < 0; });
