// The labeling page: shows a task, reads keys, mouse and touch, and delivers the label to the server.

import { Courier, Failed, Memory, Refused, Unreachable, ask, newKey, token } from "./api.js";
import { promptTurns } from "./cards.js";
import { WorkClock } from "./clock.js";
import { TaskForm } from "./form.js";
import { addText, inWords, showGuidelines } from "./text.js";

const DRAFT_AFTER_MS = 500;
const DRAFT_AGAIN_MS = 4000;
const LOOK_AGAIN_MS = 15000;
const LOOK_FOR_SAMPLED_MS = 2000;
const PLAN_CHANGED = "The instructions have changed.";

const $ = (id) => document.getElementById(id);
const courier = new Courier(showLost, () => ($("lost").hidden = true));
const clock = new WorkClock();
const form = new TaskForm((what) => changed(what));

let session = null;
let memory = null;
let task = null;
let key = "";
let isBusy = true;
let isFinished = false; // nothing is left for this annotator now
let growth = null; // how many prompts are sampled, and of how many; null once all are
let lookedAt = 0;

// Display

function say(text) {
  $("status").textContent = text;
}

function showLost(reason, seconds) {
  $("lost-text").textContent = `Not saved yet: ${reason}. This browser keeps your label and sends it again${
    seconds > 2 ? ` in about ${Math.round(seconds)} s` : ""
  }.`;
  $("lost").hidden = false;
}

function showProgress({ progress, tasks, is_sampling: isSampling }) {
  growth = progress.growth;
  const all = progress.mine + progress.left_for_me;
  $("progress").max = Math.max(all, 1);
  $("progress").value = progress.mine;
  $("tasks").hidden = !tasks;
  $("tasks").textContent = `${tasks}.`;
  const parts = [progress.mine === 0 && tasks ? tasks : `${progress.mine} done`, `${progress.left_for_me} left`];
  if (progress.pace_seconds) {
    parts.push(`${inWords(progress.pace_seconds)} each`);
    if (progress.left_for_me) parts.push(`about ${inWords(progress.pace_seconds * progress.left_for_me)} remaining`);
  }
  if (growth) parts.push(howFarSampled(isSampling));
  $("pace").textContent = parts.join(" · ");
}

function howFarSampled(isSampling) {
  const { sampled, prompts } = growth;
  return isSampling ? `${sampled} of ${prompts} prompts sampled` : `sampling stopped at ${sampled} of ${prompts} prompts`;
}

/** Show the next task; if its plan differs from the displayed one, load that plan first. */
async function show(next) {
  const before = session;
  if (next.task && next.task.plan !== session.plan) {
    const fresh = next.criteria ? next : await courier.deliver("/api/session");
    showPlan(fresh);
    next = fresh;
  }
  showProgress(next);
  if (next.task) showTask(next.task);
  else showFinished(next.progress, next.is_sampling);
  if (session !== before && task) tellPlanChanged(before.guidelines);
}

function tellPlanChanged(guidelinesBefore) {
  $("problem").textContent = PLAN_CHANGED;
  if (session.guidelines && session.guidelines !== guidelinesBefore) openHelp(PLAN_CHANGED);
}

function showPlan(fresh) {
  session = fresh;
  $("guidelines").hidden = !session.guidelines;
  showGuidelines($("guidelines"), session.guidelines ?? "");
  $("skip-means").textContent =
    session.set_aside_after === 1
      ? "skip; nobody else gets this task"
      : "skip; others may still get this task";
}

function showTask(next) {
  task = next;
  key = newKey();
  const local = memory.get(`draft-${task.id}`); // what the server has not received yet
  const draft = local ? local.entry : task.draft;
  clock.start(Math.max(task.active_seconds, local ? local.active_seconds : 0));
  $("message").hidden = true;
  $("task").hidden = false;
  $("task-title").textContent = `Task ${task.number}`;
  document.title = `Task ${task.number} · labeling`;
  $("prompt").replaceChildren(...promptTurns(task.prompt));
  form.show(session, task, draft);
  scrollTo(0, 0);
  $("task-title").focus({ preventScroll: true });
  hasUnsaved = Boolean(local); // sent as soon as no other request is pending
}

function showMessage(title, text, canUndo = false) {
  task = null;
  isFinished = false;
  $("task").hidden = true;
  $("message").hidden = false;
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  $("message-undo").hidden = !canUndo;
  document.title = title;
  $("message-title").focus();
}

function showFinished(progress, isSampling) {
  showMessage(finishedTitle(progress, isSampling), whatIsLeft(progress, isSampling), progress.mine > 0);
  isFinished = true;
}

/** Show the progress of others, in place: nothing takes the focus. */
function showHowFar(next) {
  if (!growth) return;
  showProgress(next);
  if (!task) {
    $("message-title").textContent = finishedTitle(next.progress, next.is_sampling);
    $("message-text").textContent = whatIsLeft(next.progress, next.is_sampling);
  }
}

const finishedTitle = (progress, isSampling) =>
  progress.growth && isSampling ? "The next task is on its way" : "Nothing is left for you";

function whatIsLeft(progress, isSampling) {
  if (progress.growth && isSampling) return `You have labeled everything that is ready: ${howFarSampled(true)}. The next task appears here by itself.`;
  if (progress.growth)
    return `You have labeled everything that is ready: ${howFarSampled(false)}. Once it goes on, the next task appears here by itself. You can close this page and return with the same link.`;
  return progress.is_complete
    ? "Labeling is complete. Thank you! You can close this page."
    : "Thank you! Others are still working. If one of their tasks becomes available, it appears here. You can close this page and return with the same link.";
}

// Input

function changed(what) {
  say(what);
  scheduleDraft(DRAFT_AFTER_MS);
}

let draftTimer = 0;
let pendingDraft = Promise.resolve();
let hasUnsaved = false;

function scheduleDraft(wait) {
  hasUnsaved = true;
  keepHere(task.id, form.entry);
  $("saved").textContent = "";
  clearTimeout(draftTimer);
  draftTimer = setTimeout(() => (pendingDraft = saveDraft()), wait);
}

async function saveDraft() {
  if (!task || isBusy || !hasUnsaved) return;
  const sent = { task: task.id, entry: form.entry, active_seconds: clock.seconds };
  hasUnsaved = false;
  try {
    await ask("/api/draft", sent);
    if (task?.id !== sent.task || hasUnsaved) return;
    memory.drop(`draft-${sent.task}`);
    $("lost").hidden = true;
    $("saved").textContent = "draft saved";
  } catch (error) {
    if (error instanceof Unreachable && task?.id === sent.task) {
      hasUnsaved = true;
      if (isBusy) return; // the pending request reports the state
      showLost(error.message, DRAFT_AGAIN_MS / 1000);
      scheduleDraft(DRAFT_AGAIN_MS);
    } else if (error.status === 422) await planOfDraft(error, sent.task);
    else if (error instanceof Failed && task?.id === sent.task) {
      hasUnsaved = true;
      $("saved").textContent = "draft kept in this browser only";
    } else if (error instanceof Refused) complain(error);
  }
}

/** The draft was refused: probably the plan has changed. */
async function planOfDraft(error, number) {
  try {
    const fresh = await ask("/api/session");
    if (isBusy || task?.id !== number) return;
    if (fresh.plan === session.plan) return complain(error);
    keepHere(number, form.entry);
    await show(fresh);
  } catch (again) {
    complain(again);
  }
}

function keepHere(number, given, seconds = clock.seconds) {
  memory.set(`draft-${number}`, { entry: given, active_seconds: seconds });
}

addEventListener("pagehide", () => {
  if (!task || isBusy || !hasUnsaved) return;
  // The page is closing and ignores the response; if the draft does not arrive, this browser still has it.
  ask("/api/draft", { task: task.id, entry: form.entry, active_seconds: clock.seconds }, { isLast: true }).catch(() => {});
});

function complain(error) {
  const text = error.hint ? `${error.message} (${error.hint})` : error.message;
  if (task) $("problem").textContent = text;
  else showMessage("This page cannot continue", `${text}. Reload the page to try again.`);
}

/** Submit, skip or flag the current task, or undo the last label; then show the next task. */
async function give(path, body, said) {
  clearTimeout(draftTimer);
  if (path === "/api/undo" && task && hasUnsaved) pendingDraft = saveDraft(); // the current task stays open
  isBusy = true;
  document.body.classList.add("busy");
  await pendingDraft;
  memory.set("label", { path, body });
  try {
    const next = await courier.deliver(path, body);
    hasUnsaved = false;
    if (body.task) memory.drop(`draft-${body.task}`);
    await show(next);
    say(`${said(next)} ${task ? `Task ${task.number}, ${task.completions.length} answers.` : $("message-title").textContent}`);
  } catch (error) {
    await notTaken(error, body).catch(complain);
  } finally {
    memory.drop("label");
    document.body.classList.remove("busy");
    isBusy = false;
    if (hasUnsaved && task) scheduleDraft(DRAFT_AFTER_MS);
  }
}

async function notTaken(error, body) {
  if (error.status === 401 || error.status === 403) return showMessage("This page cannot continue", error.message);
  const isInHand = Boolean(task && task.id === body.task);
  const isStillOpen = error instanceof Failed || error.status === 412 || error.status === 422;
  if (isInHand && isStillOpen) keepHere(body.task, form.entry);
  else if (isStillOpen && body.entry) keepHere(body.task, body.entry, body.active_seconds);
  if (error.code === "plan_changed") {
    const before = session;
    await show(await courier.deliver("/api/session"));
    if (session === before && task) tellPlanChanged(); // the page was reloaded in the meantime
    return;
  }
  if (error instanceof Failed && task) {
    hasUnsaved = isInHand || hasUnsaved;
    $("problem").textContent = `Not saved: ${error.message}. Your label is kept: try again, or continue.`;
    return;
  }
  if (error.status !== 422 || !task) await show(await courier.deliver("/api/next", {})); // labeled elsewhere, or no longer in the plan
  if (task) complain(error);
}

function submit() {
  const problem = form.missing;
  if (problem) {
    $("problem").textContent = problem;
    return;
  }
  const body = { task: task.id, entry: form.entry, key, active_seconds: clock.seconds, plan: session.plan };
  give("/api/submit", body, () => "Saved.");
}

function skip() {
  give("/api/skip", { task: task.id, key, active_seconds: clock.seconds }, () => "Skipped.");
}

function undo() {
  give("/api/undo", { key: newKey() }, (next) => (next.undone ? "Undone." : "There is nothing to undo."));
}

function sendFlag() {
  const reason = $("reason").value.trim();
  if (!reason) return $("reason").focus();
  $("flag-dialog").close();
  give("/api/flag", { task: task.id, key, active_seconds: clock.seconds, reason }, () => "Flagged.");
}

function openFlag() {
  $("reason").value = "";
  $("reason").maxLength = session.max_reason;
  $("flag-dialog").showModal();
  $("reason").focus();
}

// Keys

const commands = {
  Enter: submit,
  "=": () => form.toggleTie(),
  Backspace: () => form.removeLast(),
  s: skip,
  f: openFlag,
  n: () => $("note").focus(),
};

addEventListener("keydown", (event) => {
  const at = event.target;
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Enter" && event.ctrlKey && at.id === "note" && task && !isBusy) submit();
    return;
  }
  if (at.matches?.("textarea, input:not([type=radio])")) {
    if (event.key === "Escape") at.blur();
    return;
  }
  if (event.key === "Enter" && at.matches?.("button, a, summary")) return;
  if (isBusy || !session || event.repeat) return;
  if (press(event.key, at)) event.preventDefault();
});

/** Handle a key; returns whether the key means anything. */
function press(name, at) {
  const lower = name.length === 1 ? name.toLowerCase() : name;
  if (lower === "?") return openHelp(), true;
  if (lower === "u") return undo(), true;
  if (!task) return false;
  if (commands[lower]) return commands[lower](), true;
  if (/^[1-9]$/.test(lower)) return form.chooseByDigit(lower, at);
  return form.rank(lower);
}

function openHelp(news = "") {
  $("help-news").textContent = news;
  if (!$("help-dialog").open) $("help-dialog").showModal();
}

const act = (what) => () => {
  if (!isBusy) what();
  document.activeElement.blur();
};
$("submit").addEventListener("click", act(() => task && submit()));
$("tie").addEventListener("click", act(commands["="]));
$("back").addEventListener("click", act(commands.Backspace));
$("undo").addEventListener("click", act(undo));
$("message-undo").addEventListener("click", act(undo));
$("skip").addEventListener("click", act(skip));
$("flag").addEventListener("click", () => isBusy || openFlag());
$("flag-send").addEventListener("click", sendFlag);
$("flag-cancel").addEventListener("click", () => $("flag-dialog").close());
$("reason").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  sendFlag();
});
$("note").addEventListener("input", () => task && scheduleDraft(DRAFT_AFTER_MS));
$("help").addEventListener("click", () => openHelp());
$("help-close").addEventListener("click", () => $("help-dialog").close());
$("retry").addEventListener("click", () => (courier.wake(), hasUnsaved && scheduleDraft(0)));
$("to-board").addEventListener("click", (event) => {
  event.preventDefault(); // the URL's # holds the token
  $("board").focus();
});
addEventListener("hashchange", () => location.reload());

// Start

async function begin() {
  if (!token()) return showMessage("Open your own link", "This address has no access token. Ask the administrator for your link.");
  try {
    showPlan(await courier.deliver("/api/session"));
  } catch (error) {
    return showMessage(error instanceof Failed ? "This page cannot start" : "This link does not work", error.message);
  }
  memory = new Memory(`rlhf-label-${session.store}`);
  addText($("who"), session.annotator);
  const unsent = memory.get("label");
  if (unsent) await give(unsent.path, unsent.body, () => "Your last label, which had not been sent, is saved now.");
  else await show(session);
  isBusy = false;
  if (task && hasUnsaved) scheduleDraft(0);
  if (session.guidelines && session.progress.mine === 0 && task && !$("help-dialog").open) openHelp();
}

/** Look for a task if there was none, and, with a task open, how far sampling is. */
async function look() {
  const isDue = Date.now() - lookedAt >= (growth ? LOOK_FOR_SAMPLED_MS : LOOK_AGAIN_MS);
  if (!session || isBusy || document.hidden || !isDue || !(isFinished || (task && growth))) return;
  lookedAt = Date.now();
  const before = task;
  let isMine = false;
  try {
    const next = await ask("/api/next", {});
    if (isBusy || task !== before) return;
    if (task || !next.task) return showHowFar(next);
    isBusy = isMine = true;
    await show(next);
  } catch (error) {
    if (error instanceof Refused && !task) showMessage("This page cannot continue", error.message); // otherwise it tries again
  } finally {
    if (isMine) isBusy = false;
  }
}
setInterval(look, LOOK_FOR_SAMPLED_MS);

begin();
