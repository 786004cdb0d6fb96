// The form of one task: ranking, strength, marks and note.

import { Board } from "./board.js";
import { choices, completionCard } from "./cards.js";
import { Ranking, ordinal } from "./ranking.js";

const $ = (id) => document.getElementById(id);

export class TaskForm {
  /** Calls `onChange(what)` after each change; screen readers announce `what`. */
  constructor(onChange) {
    this.onChange = onChange;
    this.board = new Board((what) => this.changed(what));
    this.session = this.task = this.ranking = this.strength = null;
    this.marks = {};
  }

  /** Show a task with what was entered before (null: nothing). */
  show(session, task, draft) {
    this.session = session;
    this.task = task;
    this.ranking = new Ranking(task.completions.length, draft ? draft.tiers : []);
    this.strength = draft ? draft.strength : null;
    this.marks = {};
    for (const criterion of session.criteria)
      this.marks[criterion] = task.completions.map((_, position) => draft?.marks[criterion]?.[position] ?? null);
    $("note").value = draft ? draft.note : "";
    $("note").maxLength = session.max_note;
    const card = (text, position) =>
      completionCard(text, task.endings[position], position, this.letter(position), this.#markGroups(position), (isPointer) =>
        this.board.toggle(position, isPointer),
      );
    $("completions").replaceChildren(...task.completions.map(card));
    this.board.show(this.ranking, task.completions, session.letters);
    this.refresh();
  }

  letter(position) {
    return this.session.letters[position].toUpperCase();
  }

  /** The entry as the API takes it. */
  get entry() {
    return { tiers: this.ranking.toJSON(), strength: this.strength, marks: this.marks, note: $("note").value };
  }

  changed(what) {
    this.refresh();
    this.onChange(what);
  }

  toggleTie() {
    this.ranking.toggleTie();
    this.changed(this.ranking.isTieNext ? "The next one ties with the last." : "No tie.");
  }

  removeLast() {
    const position = this.ranking.takeBack();
    this.changed(position === null ? "Nothing to remove." : `${this.letter(position)} is not ranked now.`);
  }

  /** Rank the completion of a letter next; returns false for a letter that names none. */
  rank(letter) {
    const position = this.session.letters.slice(0, this.task.completions.length).indexOf(letter);
    if (position < 0 || letter.length !== 1) return false;
    const isNew = this.ranking.placeNext(position);
    this.changed(isNew ? this.board.placeInWords(position) : `${this.letter(position)} is ranked already.`);
    return true;
  }

  /** One group of radio buttons per criterion. */
  #markGroups(position) {
    const [low, high] = this.session.marks;
    const letter = this.letter(position);
    const values = Array.from({ length: high - low + 1 }, (_, index) => low + index);
    return this.session.criteria.map((criterion) => {
      const name = `${criterion}-${position}`;
      const group = choices(name, criterion, values, this.marks[criterion][position], (value) => {
        this.marks[criterion][position] = value;
        this.changed(`${criterion} of ${letter}: ${value}`);
      });
      group.setAttribute("aria-label", `${criterion}, answer ${letter}, ${low} worst to ${high} best`);
      return group;
    });
  }

  refresh() {
    this.board.render();
    this.task.completions.forEach((_, position) => {
      const tier = this.ranking.tierOf(position);
      const letter = this.letter(position);
      const card = $(`completion-${position}`);
      const button = card.querySelector(".rank");
      card.classList.toggle("ranked", tier >= 0);
      const isTied = tier >= 0 && this.ranking.tiers[tier].length > 1;
      button.textContent = tier < 0 ? "rank next" : `${isTied ? "tied " : ""}${ordinal(tier + 1)} · remove`;
      button.setAttribute("aria-label", `Answer ${letter}: ${button.textContent}`);
    });
    this.#showStrength();
    $("tie").setAttribute("aria-pressed", String(this.ranking.isTieNext));
    $("submit").classList.toggle("ready", this.missing === "");
    $("problem").textContent = "";
  }

  #showStrength() {
    const isAsked = this.session.strengths.length > 0 && this.ranking.isOneBetter;
    const box = $("strength");
    if (!isAsked) {
      this.strength = null;
      box.hidden = true;
      box.replaceChildren();
      return;
    }
    const better = this.letter(this.ranking.tiers[0][0]);
    const title = `How much better is ${better}?`;
    if (!box.hidden && box.dataset.title === title) return;
    if (!box.hidden) this.strength = null; // another completion is better now
    const values = this.session.strengths.map((text, index) => [index + 1, text]);
    const group = choices("strength", title, values, this.strength, (value) => {
      this.strength = value;
      this.changed(this.session.strengths[value - 1]);
    });
    box.replaceChildren(...group.childNodes);
    box.dataset.title = title;
    box.hidden = false;
  }

  /** A sentence that says what is missing; empty if nothing is. */
  get missing() {
    const open = this.ranking.pool.map((position) => this.letter(position));
    if (open.length) return `${open.join(", ")} ${open.length > 1 ? "have" : "has"} no place yet.`;
    if (!$("strength").hidden && this.strength === null) return "Choose how much better the first answer is.";
    for (const criterion of this.session.criteria)
      for (const [position, mark] of this.marks[criterion].entries())
        if (mark === null) return `Answer ${this.letter(position)} needs a mark for “${criterion}”.`;
    return "";
  }

  /** Select in the focused group, or in the first incomplete one, and focus the next incomplete one. */
  chooseByDigit(digit, at) {
    const groups = [...document.querySelectorAll("main:not([hidden]) fieldset:not([hidden])")];
    const isOpen = (group) => !group.querySelector("input:checked");
    const group = at.closest?.("fieldset") ?? groups.find(isOpen);
    const input = group?.querySelector(`input[value="${digit}"]`);
    if (!input) return false;
    input.click();
    const later = groups.slice(groups.indexOf(group) + 1).find(isOpen) ?? groups.find(isOpen);
    if (later) later.querySelector("input").focus();
    else $("board").focus({ preventScroll: true }); // so that the next digit does not change this group
    return true;
  }
}
