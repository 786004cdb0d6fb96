// Builds page elements: turns of the prompt, completions, groups of choices.

import { addText, showText } from "./text.js";

const ROLES = ["user", "assistant", "system"];

/** The prompt as a list of turns; plain text is a single turn without a role. */
export function promptTurns(prompt) {
  const turns = typeof prompt === "string" ? [{ role: "", content: prompt }] : prompt;
  return turns.map((turn) => {
    const block = document.createElement("div");
    block.className = "turn";
    block.dataset.role = ROLES.includes(turn.role) ? turn.role : "";
    if (turn.role) {
      const role = document.createElement("p");
      role.className = "role";
      block.append(addText(role, turn.role));
    }
    block.append(showText(document.createElement("div"), turn.content));
    return block;
  });
}

/** A completion with its letter, and how it ended if it was cut off; calls `onRank(isPointer)` to rank it or to remove it from the ranking. */
export function completionCard(text, ending, position, letter, markGroups, onRank) {
  const card = document.createElement("article");
  card.className = "completion";
  card.id = `completion-${position}`;
  card.setAttribute("aria-label", `Answer ${letter}`);
  const head = document.createElement("header");
  const badge = document.createElement("span");
  badge.className = "badge";
  badge.dataset.drag = position;
  badge.textContent = letter;
  badge.title = "click to rank it next, or drag it into your ranking";
  badge.addEventListener("click", () => onRank(true));
  const rank = document.createElement("button");
  rank.type = "button";
  rank.className = "rank";
  rank.addEventListener("click", (event) => onRank(event.detail > 0));
  head.append(badge);
  if (ending) {
    const said = document.createElement("p");
    said.className = "ending";
    said.textContent = ending;
    head.append(said);
  }
  head.append(rank);
  card.append(head, showText(document.createElement("div"), text));
  if (markGroups.length) {
    const all = document.createElement("div");
    all.className = "marks";
    all.append(...markGroups);
    card.append(all);
  }
  return card;
}

/** A fieldset of radio buttons; `values` are numbers, or [number, text] pairs. */
export function choices(name, title, values, chosen, onChoose) {
  const group = document.createElement("fieldset");
  group.className = "choices";
  const legend = document.createElement("legend");
  legend.textContent = title;
  group.append(legend);
  for (const given of values) {
    const [value, text] = Array.isArray(given) ? given : [given, null];
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = name;
    input.value = String(value);
    input.checked = value === chosen;
    input.addEventListener("change", () => onChoose(value));
    const number = document.createElement("span");
    number.textContent = String(value);
    label.append(input, number);
    if (text) label.append(` ${text}`);
    group.append(label);
  }
  return group;
}
