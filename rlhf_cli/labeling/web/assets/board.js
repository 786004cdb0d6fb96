// The ranking on the page: chips that are clicked, dragged, or moved with the arrow keys.

import { addText, excerpt } from "./text.js";
import { ordinal } from "./ranking.js";

const DRAG_AFTER_PX = 6;

export class Board {
  /** Calls `onChange(what)` after each change made here; screen readers announce `what`. */
  constructor(onChange) {
    this.tiers = document.getElementById("tiers");
    this.pool = document.getElementById("pool");
    this.onChange = onChange;
    this.ranking = null;
    this.drag = null;
    this.ignoreClick = false;
    document.addEventListener("pointerdown", (event) => this.#press(event));
    document.addEventListener("pointermove", (event) => this.#move(event));
    document.addEventListener("pointerup", (event) => this.#release(event));
    document.addEventListener("pointercancel", () => this.#end());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#end();
    });
    for (const area of [this.tiers, this.pool]) {
      area.addEventListener("click", (event) => this.#click(event));
      area.addEventListener("keydown", (event) => this.#key(event));
    }
  }

  show(ranking, completions, letters) {
    this.#end();
    this.ranking = ranking;
    this.completions = completions;
    this.letters = letters;
    this.render();
  }

  render() {
    const focused = document.activeElement?.closest?.("#tiers, #pool") ? document.activeElement.dataset.position : null;
    const rows = [];
    this.ranking.tiers.forEach((tier, index) => {
      rows.push(this.#gap(index));
      const row = document.createElement("li");
      row.className = "tier";
      row.dataset.drop = `tier:${index}`;
      const place = document.createElement("span");
      place.className = "place";
      place.textContent = String(index + 1);
      row.append(place, ...tier.map((position) => this.#chip(position, index)));
      rows.push(row);
    });
    rows.push(this.#gap(this.ranking.tiers.length));
    this.tiers.replaceChildren(...rows);
    this.tiers.classList.toggle("empty", this.ranking.tiers.length === 0);
    this.tiers.classList.toggle("tie-next", this.ranking.isTieNext);
    this.pool.replaceChildren(...this.ranking.pool.map((position) => this.#chip(position, -1)));
    if (this.ranking.isWhole) this.pool.append("all ranked");
    if (focused) this.chip(focused)?.focus();
  }

  chip(position) {
    return document.querySelector(`.chip[data-position="${position}"]`);
  }

  #gap(index) {
    const gap = document.createElement("li");
    gap.className = "gap";
    gap.dataset.drop = `gap:${index}`;
    if (this.ranking.tiers.length === 0) gap.textContent = "Press or tap the letter of the best answer, or drag it here";
    else gap.setAttribute("aria-hidden", "true");
    return gap;
  }

  #chip(position, tier) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.dataset.position = position;
    chip.dataset.drag = position;
    const letter = this.letters[position].toUpperCase();
    const name = document.createElement("b");
    name.textContent = letter;
    const text = document.createElement("span");
    addText(text, excerpt(this.completions[position], 60));
    chip.append(name, text);
    const place = tier < 0 ? "not ranked; press to rank it next" : `${ordinal(tier + 1)} place; press to remove it`;
    chip.setAttribute("aria-label", `Answer ${letter}, ${place}`);
    return chip;
  }

  #click(event) {
    const chip = event.target.closest(".chip");
    if (!chip || this.ignoreClick) return;
    this.toggle(Number(chip.dataset.position), event.detail > 0);
  }

  /** Rank a completion next, or remove it from the ranking. */
  toggle(position, isPointer = true) {
    const letter = this.letters[position].toUpperCase();
    const isRanked = this.ranking.tierOf(position) >= 0;
    if (isRanked) this.ranking.remove(position);
    else this.ranking.placeNext(position);
    this.#changed(isRanked ? `${letter} is not ranked now` : this.placeInWords(position), isPointer);
  }

  placeInWords(position) {
    const tier = this.ranking.tierOf(position);
    const letter = this.letters[position].toUpperCase();
    if (tier < 0) return `${letter} is not ranked`;
    const others = this.ranking.tiers[tier].filter((other) => other !== position);
    const tie = others.length ? `, tied with ${others.map((other) => this.letters[other].toUpperCase()).join(", ")}` : "";
    return `${letter}: ${ordinal(tier + 1)} place${tie}`;
  }

  #key(event) {
    const chip = event.target.closest(".chip");
    const direction = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
    if (!chip || !direction || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const position = Number(chip.dataset.position);
    this.ranking.nudge(position, direction);
    this.#changed(this.placeInWords(position), false);
  }

  // Dragging

  #press(event) {
    const source = event.target.closest?.("[data-drag]");
    this.ignoreClick = false;
    if (!source || !this.ranking || event.button !== 0 || !event.isPrimary) return;
    this.drag = { source, position: Number(source.dataset.drag), x: event.clientX, y: event.clientY, ghost: null };
    if (source.hasPointerCapture?.(event.pointerId)) source.releasePointerCapture(event.pointerId);
    if (event.pointerType === "mouse") event.preventDefault(); // or the browser begins to select text
  }

  #move(event) {
    const drag = this.drag;
    if (!drag || !event.isPrimary) return;
    if (!drag.ghost) {
      if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < DRAG_AFTER_PX) return;
      drag.ghost = this.#chip(drag.position, -1);
      drag.ghost.classList.add("ghost");
      drag.ghost.setAttribute("aria-hidden", "true");
      drag.ghost.tabIndex = -1;
      delete drag.ghost.dataset.position;
      document.body.append(drag.ghost);
      document.body.classList.add("dragging");
      this.chip(drag.position)?.classList.add("lifted");
    }
    drag.ghost.style.transform = `translate(${event.clientX + 8}px, ${event.clientY - 18}px)`;
    this.#aim(document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-drop]") ?? null);
  }

  #aim(target) {
    if (this.drag.target === target) return;
    this.drag.target?.classList.remove("aimed");
    target?.classList.add("aimed");
    this.drag.target = target;
  }

  #release(event) {
    const drag = this.drag;
    if (!drag || !event.isPrimary) return;
    const target = drag.ghost ? drag.target : null;
    this.ignoreClick = Boolean(drag.ghost);
    this.#end();
    if (!target) return;
    this.ranking.drop(drag.position, target.dataset.drop);
    this.#changed(this.placeInWords(drag.position), true);
  }

  #end() {
    if (!this.drag) return;
    this.drag.ghost?.remove();
    this.drag.target?.classList.remove("aimed");
    document.body.classList.remove("dragging");
    document.querySelector(".lifted")?.classList.remove("lifted");
    this.drag = null;
  }

  #changed(what, isPointer) {
    if (isPointer && document.activeElement?.closest?.(".chip, .completion")) document.activeElement.blur(); // Enter submits
    this.onChange(what);
  }
}
