// Client of the API; undelivered requests are retried with the same key until the server accepts or refuses them.

const TIMEOUT_MS = 15000;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
const PASSING = [408, 502, 503, 504]; // slow or temporarily down: retried automatically

/** The server's refusal of a request. */
export class Refused extends Error {
  constructor(status, message, hint, code) {
    super(message);
    this.status = status;
    this.code = code;
    this.hint = hint;
  }
}

/** The server cannot be reached, or cannot write at the moment. */
export class Unreachable extends Error {}

/** The server failed on this request; automatic retries could loop forever. */
export class Failed extends Error {}

/** The token of this page's link; it follows the # and is sent in a header, to this server only. */
export function token() {
  return decodeURIComponent(location.hash.slice(1));
}

/** Send one request; with `isLast` it survives the closing of the page. */
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
    // rejected by the request filter, in plain text
  }
  if (PASSING.includes(response.status)) throw new Unreachable(said.error || "the server cannot respond at the moment");
  if (response.status >= 500) throw new Failed(`the server failed: ${said.error || response.status}`);
  throw new Refused(response.status, said.error, said.hint, said.code);
}

/** Retries requests until they are delivered. */
export class Courier {
  /** Calls `onLost(reason, seconds)` before each retry, and `onBack()` once a retry succeeds. */
  constructor(onLost, onBack) {
    this.onLost = onLost;
    this.onBack = onBack;
    this.wake = () => {};
    addEventListener("online", () => this.wake());
  }

  async deliver(path, body) {
    for (let wait = FIRST_WAIT_MS, wasLost = false; ; wait = Math.min(wait * 2, LONGEST_WAIT_MS)) {
      try {
        const response = await ask(path, body);
        if (wasLost) this.onBack();
        return response;
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

/** An idempotency key for one label. */
export function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Browser storage for unsent data; if storage is disabled, the data lives as long as the page. */
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
      // storage is disabled
    }
    return text ? JSON.parse(text) : null;
  }

  set(what, value) {
    const text = JSON.stringify(value);
    this.kept.set(what, text);
    try {
      localStorage.setItem(`${this.name}/${what}`, text);
    } catch (error) {
      // disabled or full: `kept` has it
    }
  }

  drop(what) {
    this.kept.delete(what);
    try {
      localStorage.removeItem(`${this.name}/${what}`);
    } catch (error) {
      // storage is disabled
    }
  }
}
