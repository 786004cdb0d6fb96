// The ranking of one task: tiers of shown positions, best first. Independent of the page.

export class Ranking {
  constructor(count, tiers = []) {
    this.count = count;
    this.tiers = tiers.map((tier) => [...tier]);
    this.placed = this.tiers.flat();
    this.isTieNext = false;
  }

  /** Unranked positions, in shown order. */
  get pool() {
    const ranked = new Set(this.tiers.flat());
    return Array.from({ length: this.count }, (_, position) => position).filter((position) => !ranked.has(position));
  }

  get isWhole() {
    return this.pool.length === 0;
  }

  tierOf(position) {
    return this.tiers.findIndex((tier) => tier.includes(position));
  }

  /** Rank a completion next, or tie it with the last one if requested; returns whether it was unranked. */
  placeNext(position) {
    if (this.tierOf(position) >= 0) return false;
    if (this.isTieNext && this.tiers.length) this.tiers[this.tiers.length - 1].push(position);
    else this.tiers.push([position]);
    this.isTieNext = false;
    this.placed.push(position);
    return true;
  }

  /** Toggle whether the next completion ties with the last one. */
  toggleTie() {
    this.isTieNext = !this.isTieNext && this.tiers.length > 0 && !this.isWhole;
    return this.isTieNext;
  }

  /** Undo the last tie sign or placement; returns the position that was removed, or null. */
  takeBack() {
    if (this.isTieNext) {
      this.isTieNext = false;
      return null;
    }
    const last = this.placed[this.placed.length - 1];
    if (last === undefined) return null;
    this.remove(last);
    return last;
  }

  remove(position) {
    this.tiers = this.tiers.map((tier) => tier.filter((other) => other !== position)).filter((tier) => tier.length);
    this.placed = this.placed.filter((other) => other !== position);
    this.isTieNext = this.isTieNext && this.tiers.length > 0;
  }

  /** Drop a completion on "pool", "tier:2" (a tie with that tier) or "gap:2" (a new tier before that one). */
  drop(position, target) {
    const [kind, index] = target.split(":");
    if (kind === "pool") return this.remove(position);
    const moved = [position];
    const onto = this.tiers[Number(index)];
    if (kind === "tier") {
      if (onto.includes(position)) return;
      onto.push(position);
    } else this.tiers.splice(Number(index), 0, moved);
    const stays = kind === "tier" ? onto : moved;
    this.tiers = this.tiers
      .map((tier) => (tier === stays ? tier : tier.filter((other) => other !== position)))
      .filter((tier) => tier.length);
    this.placed = [...this.placed.filter((other) => other !== position), position];
    this.isTieNext = false;
  }

  /** Move a completion by half a step: out of its tie, or into a tie with its neighbor. */
  nudge(position, direction) {
    const index = this.tierOf(position);
    if (index < 0) return this.placeNext(position);
    const isAlone = this.tiers[index].length === 1;
    const neighbor = index + direction;
    if (!isAlone) this.drop(position, `gap:${direction < 0 ? index : index + 1}`);
    else if (neighbor >= 0 && neighbor < this.tiers.length) this.drop(position, `tier:${neighbor}`);
  }

  /** Whether there are two completions without a tie, so that a strength can be asked for. */
  get isOneBetter() {
    return this.count === 2 && this.tiers.length === 2;
  }

  toJSON() {
    return this.tiers.map((tier) => [...tier].sort((a, b) => a - b));
  }
}

/** Ordinal of a place: 1st, 2nd, ... */
export function ordinal(number) {
  const rest = number % 100;
  const ending = rest > 10 && rest < 14 ? "th" : ["th", "st", "nd", "rd"][number % 10] || "th";
  return number + ending;
}
