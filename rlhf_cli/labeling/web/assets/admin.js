// The admin page: refreshes every two seconds.

import { Refused, ask, token } from "./api.js";
import { addText, inWords } from "./text.js";

const EVERY_MS = 2000;
const $ = (id) => document.getElementById(id);

let shown = "";

function cell(text, name = "td") {
  return addText(document.createElement(name), text);
}

function statistic(title, value, detail = "") {
  const box = document.createElement("div");
  box.className = "statistic";
  const big = document.createElement("strong");
  big.textContent = value;
  const small = document.createElement("span");
  small.textContent = title;
  const more = document.createElement("small");
  more.textContent = detail;
  box.append(small, big, more);
  return box;
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;

function show(now) {
  const { items, done, set_aside: aside, labels, labels_left: left, is_complete: isComplete, growth } = now.progress;
  $("progress").max = Math.max(items, 1);
  $("progress").value = done;
  const { labels_per_hour: pace, seconds_left: time } = now;
  const people = now.annotators.length;
  const live = growth ? `live, ${growth.sampled} of ${growth.prompts} prompts sampled` : "live";
  $("live").textContent = isComplete ? "enough prompts are labeled: the pipeline can continue" : live;
  const agreement = now.statistics.estimates.map((row) => {
    const inUnit = row.is_share ? percent : (value) => value.toFixed(2);
    return statistic(row.name, inUnit(row.value), row.low === null ? "" : `${inUnit(row.low)} to ${inUnit(row.high)}`);
  });
  $("statistics").replaceChildren(
    statistic("items done", `${done} of ${items}`, aside ? `${aside} set aside` : `${now.overlap} label${now.overlap > 1 ? "s" : ""} each`),
    statistic("labels", `${labels}`, `${left} still needed`),
    statistic("pace", pace ? `${Math.round(pace)} per hour` : "–", "over the last 15 minutes"),
    statistic("time left", left === 0 ? "none" : time ? inWords(time) : "–", left && pace ? `at this pace, ${people} ${people === 1 ? "person" : "people"}` : ""),
  );
  $("agreement").replaceChildren(...agreement);
  $("agreement").hidden = agreement.length === 0;
  $("people").replaceChildren(...now.annotators.map((row) => person(row, now.at)));
  $("warnings").replaceChildren(...now.statistics.warnings.map(warning));
  $("warnings-panel").hidden = now.statistics.warnings.length === 0;
  const comments = now.comments.map(comment);
  if (!comments.length) comments.push(cell("No comments yet.", "li"));
  $("comments").replaceChildren(...comments);
}

function person(row, now) {
  const line = document.createElement("tr");
  const name = cell(row.name, "th");
  name.scope = "row";
  const ago = row.last_at === null ? "–" : `${inWords(Math.max(0, now - row.last_at) / 1000)} ago`;
  const link = document.createElement("td");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy link";
  button.setAttribute("aria-label", `Copy the link of ${row.name}`);
  button.addEventListener("click", () => copy(row.link, button));
  link.append(button);
  line.append(
    name,
    cell(String(row.labels)),
    cell(String(row.skipped)),
    cell(String(row.flagged)),
    cell(row.median_seconds === null ? "–" : inWords(row.median_seconds)),
    cell(inWords(row.active_seconds)),
    cell(ago),
    link,
  );
  return line;
}

async function copy(link, button) {
  const own = new URL(link);
  const text = location.origin + own.pathname + own.hash; // with the host of this page, which may be a tunnel
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      return;
    } catch (error) {
      // not allowed: show the link instead
    }
  }
  const field = document.createElement("input");
  field.readOnly = true;
  field.value = text;
  field.setAttribute("aria-label", "Link to copy");
  button.replaceWith(field);
  field.select();
}

function warning(row) {
  const line = document.createElement("li");
  const about = addText(document.createElement("b"), row.about);
  const text = addText(document.createElement("span"), row.text);
  const advice = addText(document.createElement("p"), row.advice);
  advice.className = "muted";
  line.append(about, ": ", text, advice);
  return line;
}

function comment(row) {
  const line = document.createElement("li");
  const kind = document.createElement("span");
  kind.className = `kind ${row.kind}`;
  kind.textContent = row.kind;
  const who = addText(document.createElement("b"), row.annotator);
  const text = addText(document.createElement("span"), row.text || "no reason given");
  const prompt = addText(document.createElement("p"), row.prompt);
  prompt.className = "muted";
  line.append(kind, " ", who, " ", text, prompt);
  return line;
}

async function look() {
  if (document.hidden) return;
  try {
    const now = await ask("/api/admin/overview");
    const text = JSON.stringify({ ...now, at: 0 });
    const isHeld = document.activeElement?.closest("#people"); // a link is being copied
    if (!isHeld && (text !== shown || now.annotators.length)) show(now);
    shown = text;
    $("lost").hidden = true;
  } catch (error) {
    $("lost").textContent = error instanceof Refused ? `${error.message} (${error.hint})` : `Not up to date: ${error.message}.`;
    $("lost").hidden = false;
  }
}

async function add() {
  const name = $("name").value.trim();
  if (!name) return $("name").focus();
  try {
    const made = await ask("/api/admin/annotators", { name });
    $("name").value = "";
    $("added").textContent = `${made.name} can label now: copy the link above.`;
    await look();
  } catch (error) {
    $("added").textContent = error.hint ? `${error.message} (${error.hint})` : error.message;
  }
}

async function download() {
  const response = await fetch("/api/admin/labels.jsonl", { headers: { authorization: `Bearer ${token()}` } });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = "labels.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

$("add").addEventListener("click", add);
$("name").addEventListener("keydown", (event) => event.key === "Enter" && add());
$("download").addEventListener("click", download);
addEventListener("hashchange", () => location.reload());
document.addEventListener("visibilitychange", look);
setInterval(look, EVERY_MS);
look();
