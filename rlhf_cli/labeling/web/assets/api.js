// Talks to the server; what could not be delivered is tried again, with the same key, until the server says yes or no.

const TIMEOUT_MS = 15000;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
const PASSING = [408, 502, 503, 504]; // slow, or down for the moment: worth another attempt by itself

/** The server's refusal of a request. */
export class Refused extends Error {
  constructor(status, message, hint, code) {
    super(message);
    this.status = status;
    this.code = code;
    this.hint = hint;
  }
}

/** The server cannot be reached, or cannot write now. */
export class Unreachable extends Error {}

/** The server failed over this request; sending the same again by itself would go on for ever. */
export class Failed extends Error {}

/** The token of this page's link; it stands behind the # and is sent in a header, to this server alone. */
export function token() {
  return decodeURIComponent(location.hash.slice(1));
}

/** One attempt; with `isLast` it outlives the page. */
export async function ask(path, body, { isLast = false } = {}) {
  const headers = { authorization: `Bearer ${token()}` };
  const request = { headers, method: body === undefined ? "GET" : "POST", cache: "no-store", keepalive: isLast };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  if (!isLast) request.signal = AbortSignal.timeout(TIMEOUT_MS);
  let response;
  let text;
  try {
    response = await fetch(path, request);
    text = await response.text();
  } catch (error) {
    throw new Unreachable("the server cannot be reached");
  }
  if (response.ok) return JSON.parse(text);
  let said = { error: text.trim() };
  try {
    said = JSON.parse(text);
  } catch (error) {
    // refused at the gate, in plain text
  }
  if (PASSING.includes(response.status)) throw new Unreachable(said.error || "the server cannot answer now");
  if (response.status >= 500) throw new Failed(`the server failed: ${said.error || response.status}`);
  throw new Refused(response.status, said.error, said.hint, said.code);
}

/** Delivers requests however often it takes. */
export class Courier {
  /** `onLost(reason, seconds)` while it waits to try again, `onBack()` when it got through after that. */
  constructor(onLost, onBack) {
    this.onLost = onLost;
    this.onBack = onBack;
    this.wake = () => {};
    addEventListener("online", () => this.wake());
  }

  async deliver(path, body) {
    for (let wait = FIRST_WAIT_MS, wasLost = false; ; wait = Math.min(wait * 2, LONGEST_WAIT_MS)) {
      try {
        const answer = await ask(path, body);
        if (wasLost) this.onBack();
        return answer;
      } catch (error) {
        if (!(error instanceof Unreachable)) {
          if (wasLost) this.onBack();
          throw error;
        }
        wasLost = true;
        this.onLost(error.message, wait / 1000);
        await new Promise((resolve) => {
          const timer = setTimeout(resolve, wait * (0.8 + 0.4 * Math.random()));
          this.wake = () => (clearTimeout(timer), resolve());
        });
      }
    }
  }
}

/** A key for one answer, the same however often it is sent. */
export function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A small memory of this browser's; where it has none, what was not sent yet lives as long as the page. */
export class Memory {
  constructor(name) {
    this.name = name;
    this.kept = new Map();
  }

  get(what) {
    let text = this.kept.get(what);
    try {
      text = localStorage.getItem(`${this.name}/${what}`) ?? text;
    } catch (error) {
      // storage is forbidden here
    }
    return text ? JSON.parse(text) : null;
  }

  set(what, value) {
    const text = JSON.stringify(value);
    this.kept.set(what, text);
    try {
      localStorage.setItem(`${this.name}/${what}`, text);
    } catch (error) {
      // forbidden or full: `kept` has it
    }
  }

  drop(what) {
    this.kept.delete(what);
    try {
      localStorage.removeItem(`${this.name}/${what}`);
    } catch (error) {
      // storage is forbidden here
    }
  }
}
