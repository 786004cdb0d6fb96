// Active time: counted while the page is visible and there was activity within the last minute.

const IDLE_AFTER_MS = 60000;
const ACTS = ["keydown", "pointerdown", "pointermove", "wheel", "scroll", "touchmove"];

export class WorkClock {
  constructor() {
    this.activeMs = 0;
    this.countedAt = this.lastAct = performance.now();
    const act = () => (this.#count(), (this.lastAct = performance.now()));
    for (const name of ACTS) addEventListener(name, act, { passive: true, capture: true });
    document.addEventListener("visibilitychange", () => this.#count(!document.hidden));
  }

  /** Start with the time spent on the task before. */
  start(seconds) {
    this.activeMs = 1000 * seconds;
    this.countedAt = this.lastAct = performance.now();
  }

  /** Active seconds on the current task. */
  get seconds() {
    this.#count();
    return Math.round(this.activeMs) / 1000;
  }

  #count(wasHidden = document.hidden) {
    const now = performance.now();
    const end = Math.min(now, this.lastAct + IDLE_AFTER_MS);
    if (!wasHidden) this.activeMs += Math.max(0, end - this.countedAt);
    this.countedAt = now;
  }
}
