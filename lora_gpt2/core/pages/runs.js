"use strict";
// Trains on a text that the user sends: first the plan, then the run, whose page is linked. One at a time.

const $ = (id) => document.getElementById(id);
let polling = null;
let sent = null;  // what the server has of this page: its text and the id that it got
let planned = null;  // the id of the plan that is shown
let isEdited = false;  // since then
let shown = null;  // what was last heard of the server

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(text, ...more) {
  $("said").replaceChildren(text, ...more);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const answer = await fetch(path, { ...options, headers });
  const found = await answer.json();
  $("needs-key").hidden = answer.status !== 401 && !$("key").value;
  if (!answer.ok) throw Object.assign(new Error(found.error.message), { status: answer.status, param: found.error.param });
  return found;
}

function post(path, body) {
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

async function send() {
  const file = $("file").files[0], text = $("text").value;
  if (!file && !text.trim()) throw new Error("choose a file, or paste some text");
  const key = file ? `${file.name} ${file.size} ${file.lastModified}` : text;
  if (key === sent?.key) return;
  say("sending…");
  const name = file ? file.name : `${$("name").value}.txt`;
  const { id } = await ask(`job/upload?file=${encodeURIComponent(name)}`, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file ?? new Blob([text]) });
  sent = { key, id };
}

async function plan(event) {
  event.preventDefault();
  hide("train", "resume", "fresh");
  $("planned").hidden = true;
  try {
    isEdited = false;
    show(await askForPlan());
  } catch (error) {
    sent = null;  // the server may have lost it
    say(error.message);
  }
}

async function askForPlan() {
  await send();
  const settings = { name: $("name").value, steps: $("steps").value ? Number($("steps").value) : null, forget: $("forget").checked ? 0.1 : null };
  try {
    return await post("job/plan", { ...settings, upload: sent.id });
  } catch (error) {
    if (error.param !== "upload") throw error;
    sent = null;  // another tab has sent a text of its own
    await send();
    return post("job/plan", { ...settings, upload: sent.id });
  }
}

async function train(begin) {
  hide("train", "resume", "fresh");
  try {
    show(await post("job/train", { begin, plan: planned }));
  } catch (error) {
    say(error.message);
  }
}

function hide(...ids) {
  for (const id of ids) $(id).hidden = true;
}

function formatBytes(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(0)} MB`;
}

function formatTime(seconds) {
  return seconds >= 60 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${Math.max(1, Math.round(seconds))} s`;
}

function showPlan(plan) {
  if (!plan) return void ($("planned").hidden = true);
  const figures = [[`${formatBytes(plan.peak_bytes)} of ${formatBytes(plan.budget_bytes)}`, `memory, on ${plan.device} in ${plan.dtype}`]];
  if (plan.tokens) figures.push([plan.tokens.toLocaleString("en"), "tokens to train on, passes counted"]);
  if (plan.tokens_per_second) figures.push([Math.round(plan.tokens_per_second).toLocaleString("en"), "tokens per second, measured over two steps"]);
  if (plan.seconds) figures.push([formatTime(plan.seconds), "without validation"]);
  $("figures").replaceChildren(...figures.map(([value, label]) => element("div", {}, element("b", { textContent: value }), element("span", { textContent: label }))));
  $("planned").hidden = false;
}

function showRun(key) {
  return element("a", { href: `${key}/`, textContent: "watch it" });
}

function show(job) {
  const isBusy = ["planning", "training"].includes(job.state);
  $("plan").disabled = isBusy;
  $("line").textContent = isBusy ? job.line : "";
  clearTimeout(polling);
  polling = setTimeout(poll, isBusy ? 1000 : 5000);  // another tab may begin something
  if (!isBusy || job.run) listRuns();
  const news = JSON.stringify([job.state, job.upload_id, job.plan_id, job.run, job.error, job.adapter?.version]);
  if (news === shown) return;  // what is said stays
  shown = news;
  hide("train", "resume", "fresh");
  if (job.state === "idle") say("");
  if (isEdited && job.state === "planned") return;  // it is a plan of something else
  showPlan(job.plan);
  planned = job.plan_id;
  if (job.state === "planning") say("reading the text, and timing two steps…");
  if (job.state === "planned") {
    const becomes = job.next_version > 1 ? `version ${job.next_version} of ${job.name}, from nothing and in use at once,` : job.name;
    say(job.plan.fits ? `${job.file} becomes ${becomes} on ${job.base}: begin?` : "it does not fit into memory");
    $("train").hidden = !job.plan.fits;
  }
  if (job.state === "training") say(`training ${job.name}… `, ...(job.run ? [showRun(job.run)] : []));
  if (job.state === "done") {
    const { name, version, base_perplexity, validation_perplexity, verdict } = job.adapter;
    say(`${name}@${version}: validation perplexity ${base_perplexity.toFixed(2)} → ${validation_perplexity.toFixed(2)}; ${verdict} `, element("a", { href: `../?adapter=${encodeURIComponent(name)}`, textContent: "write with it" }));
    sent = null;
  }
  if (job.state === "failed") {
    const isInterrupted = job.error.type === "InterruptedRunError";
    say(isInterrupted ? job.error.message : `${job.error.message}; ${job.error.hint}`);
    for (const id of ["resume", "fresh"]) $(id).hidden = !isInterrupted;
  }
}

async function poll() {
  try {
    show(await ask("job/"));
  } catch (error) {
    if (error.status === 403) $("form").replaceChildren(element("p", { className: "lead", textContent: error.message }));
    else if (error.status !== 401) {
      say(`the server does not answer: ${error.message}`);
      shown = null;
      polling = setTimeout(poll, 3000);
    }
  }
}

async function listRuns() {
  const { runs } = await ask("list");
  $("runs").tBodies[0].replaceChildren(...runs.map(({ key, adapters, state, begun }) => element("tr", {}, element("td", {}, element("a", { href: `${key}/`, textContent: adapters })), element("td", { textContent: state }), element("td", { className: "word", textContent: new Date(begun).toLocaleString() }))));
  $("runs").hidden = !runs.length;
  $("none").hidden = runs.length > 0;
}

$("form").addEventListener("submit", plan);
for (const [id, begin] of [["train", null], ["resume", "resume"], ["fresh", "fresh"]]) $(id).addEventListener("click", () => train(begin));
for (const id of ["file", "text", "name", "steps", "forget"]) {
  $(id).addEventListener("input", () => { isEdited = true; hide("train", "planned"); });  // what is planned is something else
}
poll();
