// The labeling page: shows a task, takes what somebody enters by keys, mouse or finger, and sees that it arrives.

import { Ranking, ordinal } from "./answer.js";
import { Courier, Failed, Memory, Refused, Unreachable, ask, newKey, token } from "./api.js";
import { Board } from "./board.js";
import { answerCard, choices, promptTurns } from "./cards.js";
import { WorkClock } from "./clock.js";
import { addText, inWords, showGuidelines } from "./text.js";

const DRAFT_AFTER_MS = 500;
const DRAFT_AGAIN_MS = 4000;
const LOOK_AGAIN_MS = 15000;
const PLAN_CHANGED = "What is asked has changed.";

const $ = (id) => document.getElementById(id);
const courier = new Courier(showLost, () => ($("lost").hidden = true));
const clock = new WorkClock();
const board = new Board((what) => changed(what));

let session = null;
let memory = null;
let task = null;
let ranking = null;
let strength = null;
let marks = {};
let key = "";
let isBusy = true;

// Showing

function say(text) {
  $("status").textContent = text;
}

function showLost(reason, seconds) {
  $("lost-text").textContent = `Not saved yet: ${reason}. It is kept here and will be sent again${
    seconds > 2 ? ` in about ${Math.round(seconds)} s` : ""
  }.`;
  $("lost").hidden = false;
}

function showProgress(progress) {
  const all = progress.mine + progress.left_for_me;
  $("progress").max = Math.max(all, 1);
  $("progress").value = progress.mine;
  const parts = [`${progress.mine} done`, `${progress.left_for_me} left`];
  if (progress.pace_seconds) {
    parts.push(`${inWords(progress.pace_seconds)} each`);
    if (progress.left_for_me) parts.push(`about ${inWords(progress.pace_seconds * progress.left_for_me)} to go`);
  }
  $("pace").textContent = parts.join(" · ");
}

/** Show what comes next; where that is asked under another plan than the one that is shown, that plan first. */
async function show(answer) {
  const before = session;
  if (answer.task && answer.task.plan !== session.plan) {
    const fresh = answer.criteria ? answer : await courier.deliver("/api/session");
    showPlan(fresh);
    answer = fresh;
  }
  showProgress(answer.progress);
  if (answer.task) showTask(answer.task);
  else showFinished(answer.progress);
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
      ? "skip: leave it out; nobody else is asked"
      : "skip: you leave it out; others may have it";
}

function showTask(next) {
  task = next;
  key = newKey();
  const local = memory.get(`draft-${task.id}`); // what the server has not got yet
  const draft = local ? local.entry : task.draft;
  clock.start(Math.max(task.active_seconds, local ? local.active_seconds : 0));
  ranking = new Ranking(task.answers.length, draft ? draft.tiers : []);
  strength = draft ? draft.strength : null;
  marks = {};
  for (const criterion of session.criteria)
    marks[criterion] = task.answers.map((_, position) => draft?.marks[criterion]?.[position] ?? null);
  $("note").value = draft ? draft.note : "";
  $("note").maxLength = session.max_note;
  $("message").hidden = true;
  $("task").hidden = false;
  $("task-title").textContent = `Task ${task.number}`;
  document.title = `Task ${task.number} · labeling`;
  $("prompt").replaceChildren(...promptTurns(task.prompt));
  const card = (text, position) =>
    answerCard(text, position, session.letters[position].toUpperCase(), markGroups(position), (isPointer) =>
      board.toggle(position, isPointer),
    );
  $("answers").replaceChildren(...task.answers.map(card));
  board.show(ranking, task.answers, session.letters);
  refresh();
  scrollTo(0, 0);
  $("task-title").focus({ preventScroll: true });
  hasUnsaved = Boolean(local); // sent as soon as nothing else is under way
}

/** What an answer is marked for: a group of radio buttons for each criterion. */
function markGroups(position) {
  const [low, high] = session.marks;
  const letter = session.letters[position].toUpperCase();
  const values = Array.from({ length: high - low + 1 }, (_, index) => low + index);
  return session.criteria.map((criterion) => {
    const name = `${criterion}-${position}`;
    const group = choices(name, criterion, values, marks[criterion][position], (value) => {
      marks[criterion][position] = value;
      changed(`${criterion} of ${letter}: ${value}`);
    });
    group.setAttribute("aria-label", `${criterion}, answer ${letter}, ${low} worst to ${high} best`);
    return group;
  });
}

function refresh() {
  board.render();
  task.answers.forEach((_, position) => {
    const tier = ranking.tierOf(position);
    const letter = session.letters[position].toUpperCase();
    const card = $(`answer-${position}`);
    const button = card.querySelector(".rank");
    card.classList.toggle("ranked", tier >= 0);
    const isTied = tier >= 0 && ranking.tiers[tier].length > 1;
    button.textContent = tier < 0 ? "rank next" : `${isTied ? "tied " : ""}${ordinal(tier + 1)} · take out`;
    button.setAttribute("aria-label", `Answer ${letter}: ${button.textContent}`);
  });
  showStrength();
  $("tie").setAttribute("aria-pressed", String(ranking.isTieNext));
  $("submit").classList.toggle("ready", lacking() === "");
  $("problem").textContent = "";
}

function showStrength() {
  const isAsked = session.strengths.length > 0 && ranking.isOneBetter;
  const box = $("strength");
  if (!isAsked) {
    strength = null;
    box.hidden = true;
    box.replaceChildren();
    return;
  }
  const better = session.letters[ranking.tiers[0][0]].toUpperCase();
  const title = `How much better is ${better}?`;
  if (!box.hidden && box.dataset.title === title) return;
  if (!box.hidden) strength = null; // the other one is better now
  const values = session.strengths.map((text, index) => [index + 1, text]);
  const group = choices("strength", title, values, strength, (value) => {
    strength = value;
    changed(session.strengths[value - 1]);
  });
  box.replaceChildren(...group.childNodes);
  box.dataset.title = title;
  box.hidden = false;
}

/** What is still to be entered, in words; empty if nothing is. */
function lacking() {
  const open = ranking.pool.map((position) => session.letters[position].toUpperCase());
  if (open.length) return `${open.join(", ")} ${open.length > 1 ? "have" : "has"} no place yet.`;
  if (!$("strength").hidden && strength === null) return "How much better is it?";
  for (const criterion of session.criteria)
    for (const [position, mark] of marks[criterion].entries())
      if (mark === null) return `Answer ${session.letters[position].toUpperCase()} lacks its mark for “${criterion}”.`;
  return "";
}

function showMessage(title, text, canUndo = false) {
  task = null;
  $("task").hidden = true;
  $("message").hidden = false;
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  $("message-undo").hidden = !canUndo;
  document.title = title;
  $("message-title").focus();
}

function showFinished(progress) {
  showMessage(
    "Nothing is left for you",
    progress.is_complete
      ? "Everything is labeled: thank you. Whoever leads the labeling can go on now; you can close this page."
      : "Thank you. Others are still at work; if one of their tasks comes free, it appears here by itself. You can close this page and come back by the same link.",
    progress.mine > 0,
  );
}

// Entering

function changed(what) {
  refresh();
  say(what);
  scheduleDraft(DRAFT_AFTER_MS);
}

const entry = () => ({ tiers: ranking.toJSON(), strength, marks, note: $("note").value });

let draftTimer = 0;
let draftUnderWay = Promise.resolve();
let hasUnsaved = false;

function scheduleDraft(wait) {
  hasUnsaved = true;
  keepHere(task.id, entry());
  $("saved").textContent = "";
  clearTimeout(draftTimer);
  draftTimer = setTimeout(() => (draftUnderWay = saveDraft()), wait);
}

async function saveDraft() {
  if (!task || isBusy || !hasUnsaved) return;
  const sent = { task: task.id, entry: entry(), active_seconds: clock.seconds };
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
      if (isBusy) return; // what is under way says how it stands
      showLost(error.message, DRAFT_AGAIN_MS / 1000);
      scheduleDraft(DRAFT_AGAIN_MS);
    } else if (error.status === 422) await planOfDraft(error, sent.task);
    else if (error instanceof Failed && task?.id === sent.task) {
      hasUnsaved = true;
      $("saved").textContent = "draft kept in this browser only";
    } else if (error instanceof Refused) complain(error);
  }
}

/** A draft was not taken: most likely it holds what nobody asks for any more. */
async function planOfDraft(error, number) {
  try {
    const fresh = await ask("/api/session");
    if (isBusy || task?.id !== number) return;
    if (fresh.plan === session.plan) return complain(error);
    keepHere(number, entry());
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
  // The answer is of no use to a page that goes away; if it does not arrive, this browser's memory has the draft.
  ask("/api/draft", { task: task.id, entry: entry(), active_seconds: clock.seconds }, { isLast: true }).catch(() => {});
});

function complain(error) {
  const text = error.hint ? `${error.message} (${error.hint})` : error.message;
  if (task) $("problem").textContent = text;
  else showMessage("This page cannot go on", `${text}. Load it again to try once more.`);
}

/** Give an answer to the task in hand, or take the last one back, and show what comes next. */
async function give(path, body, said) {
  clearTimeout(draftTimer);
  if (path === "/api/undo" && task && hasUnsaved) draftUnderWay = saveDraft(); // it is left behind for now
  isBusy = true;
  document.body.classList.add("busy");
  await draftUnderWay;
  memory.set("answer", { path, body });
  try {
    const answer = await courier.deliver(path, body);
    hasUnsaved = false;
    if (body.task) memory.drop(`draft-${body.task}`);
    await show(answer);
    say(`${said(answer)} ${task ? `Task ${task.number}, ${task.answers.length} answers.` : $("message-title").textContent}`);
  } catch (error) {
    await notTaken(error, body).catch(complain);
  } finally {
    memory.drop("answer");
    document.body.classList.remove("busy");
    isBusy = false;
    if (hasUnsaved && task) scheduleDraft(DRAFT_AFTER_MS);
  }
}

async function notTaken(error, body) {
  if (error.status === 401 || error.status === 403) return showMessage("This page cannot go on", error.message);
  const isInHand = Boolean(task && task.id === body.task);
  const isStillOpen = error instanceof Failed || error.status === 412 || error.status === 422;
  if (isInHand && isStillOpen) keepHere(body.task, entry());
  else if (isStillOpen && body.entry) keepHere(body.task, body.entry, body.active_seconds);
  if (error.code === "plan_changed") {
    const before = session;
    await show(await courier.deliver("/api/session"));
    if (session === before && task) tellPlanChanged(); // the page was loaded again meanwhile
    return;
  }
  if (error instanceof Failed && task) {
    hasUnsaved = isInHand || hasUnsaved;
    $("problem").textContent = `Not saved: ${error.message}. What you entered is kept: try again, or go on.`;
    return;
  }
  if (error.status !== 422 || !task) await show(await courier.deliver("/api/next", {})); // answered elsewhere, or gone
  if (task) complain(error);
}

function submit() {
  const problem = lacking();
  if (problem) {
    $("problem").textContent = problem;
    return;
  }
  const body = { task: task.id, entry: entry(), key, active_seconds: clock.seconds, plan: session.plan };
  give("/api/submit", body, () => "Saved.");
}

function skip() {
  give("/api/skip", { task: task.id, key, active_seconds: clock.seconds }, () => "Skipped.");
}

function undo() {
  give("/api/undo", { key: newKey() }, (answer) =>
    answer.undone ? "Went back." : "There is nothing to go back to.",
  );
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
  "=": () => {
    ranking.toggleTie();
    changed(ranking.isTieNext ? "The next one ties with the last." : "No tie.");
  },
  Backspace: () => {
    const position = ranking.takeBack();
    changed(position === null ? "Nothing to take back." : `${session.letters[position].toUpperCase()} has no place now.`);
  },
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

/** Do what a key says; returns whether it says anything. */
function press(name, at) {
  const lower = name.length === 1 ? name.toLowerCase() : name;
  if (lower === "?") return openHelp(), true;
  if (lower === "u") return undo(), true;
  if (!task) return false;
  if (commands[lower]) return commands[lower](), true;
  if (/^[1-9]$/.test(lower)) return chooseByDigit(lower, at);
  const position = session.letters.slice(0, task.answers.length).indexOf(lower);
  if (position < 0 || lower.length !== 1) return false;
  const isNew = ranking.placeNext(position);
  changed(isNew ? board.placeInWords(position) : `${lower.toUpperCase()} has a place already.`);
  return true;
}

/** A digit chooses in the group that has the focus, else in the first one that is open; the next open one is next. */
function chooseByDigit(digit, at) {
  const groups = [...document.querySelectorAll("main:not([hidden]) fieldset:not([hidden])")];
  const isOpen = (group) => !group.querySelector("input:checked");
  const group = at.closest?.("fieldset") ?? groups.find(isOpen);
  const input = group?.querySelector(`input[value="${digit}"]`);
  if (!input) return false;
  input.click();
  const later = groups.slice(groups.indexOf(group) + 1).find(isOpen) ?? groups.find(isOpen);
  if (later) later.querySelector("input").focus();
  else $("board").focus({ preventScroll: true }); // so that the next digit does not change this one
  return true;
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
  event.preventDefault(); // the link's # holds the token
  $("board").focus();
});
addEventListener("hashchange", () => location.reload());

// Beginning

async function begin() {
  if (!token()) return showMessage("Open your own link", "This address lacks the part that says who you are. Ask whoever leads the labeling.");
  try {
    showPlan(await courier.deliver("/api/session"));
  } catch (error) {
    return showMessage(error instanceof Failed ? "This page cannot begin" : "This link does not work", error.message);
  }
  memory = new Memory(`rlhf-label-${session.store}`);
  addText($("who"), session.annotator);
  const unsent = memory.get("answer");
  if (unsent) await give(unsent.path, unsent.body, () => "What was not sent the last time is saved now.");
  else await show(session);
  isBusy = false;
  if (task && hasUnsaved) scheduleDraft(0);
  if (session.guidelines && session.progress.mine === 0 && task && !$("help-dialog").open) openHelp();
}

setInterval(async () => {
  if (!session || task || isBusy || document.hidden || $("message-title").textContent !== "Nothing is left for you") return;
  try {
    const answer = await ask("/api/next", {});
    if (!answer.task || task || isBusy) return;
    isBusy = true;
    await show(answer);
  } catch (error) {
    if (error instanceof Refused) showMessage("This page cannot go on", error.message); // else: the next look
  } finally {
    isBusy = false;
  }
}, LOOK_AGAIN_MS);

begin();
