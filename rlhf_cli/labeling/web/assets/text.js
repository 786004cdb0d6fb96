// Displays untrusted text: always as text, never as markup or control characters.

// Control characters, bidirectional marks and invisible characters.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|\udb40[\udc00-\udfff]/g;
const NAMES = {
  0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x0d: "CR", 0x1b: "ESC", 0x7f: "DEL", 0x9b: "CSI",
};

/** Append text to an element; invisible characters become visible labels. */
export function addText(element, text) {
  let from = 0;
  const clean = text.replace(/\r\n/g, "\n");
  for (const match of clean.matchAll(HIDDEN)) {
    if (match.index > from) element.append(clean.slice(from, match.index));
    element.append(label(match[0].codePointAt(0)));
    from = match.index + match[0].length;
  }
  if (from < clean.length) element.append(clean.slice(from));
  return element;
}

function label(code) {
  const shown = document.createElement("span");
  shown.className = "hidden-character";
  const number = "U+" + code.toString(16).toUpperCase().padStart(4, "0");
  shown.textContent = NAMES[code] || number;
  shown.title = `invisible character ${number}`;
  return shown;
}

/** Replace the content of an element by a text; text between ``` fences is shown as code. */
export function showText(element, text) {
  element.replaceChildren();
  element.classList.add("text");
  const lines = text.replace(/\r\n/g, "\n").split("\n");
  let block = null;
  let isCode = false;
  const begin = (name) => {
    block = document.createElement("div");
    block.className = name;
    block.dir = name === "code" ? "ltr" : "auto";
    element.append(block);
  };
  lines.forEach((line, number) => {
    const isFence = line.trimStart().startsWith("```");
    if (isFence && !isCode) begin("code");
    else if (block === null) begin("plain");
    addText(block, line + (number < lines.length - 1 ? "\n" : ""));
    if (isFence) {
      if (isCode) block = null;
      isCode = !isCode;
    }
  });
  return element;
}

/** The beginning of a text, on one line. */
export function excerpt(text, length = 90) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > length ? line.slice(0, length - 1) + "…" : line;
}

/** Guidelines: Markdown headings, lists and paragraphs; everything else as plain text. */
export function showGuidelines(element, text) {
  element.replaceChildren();
  let list = null;
  let paragraph = null;
  for (const line of text.replace(/\r\n/g, "\n").split("\n")) {
    const heading = line.match(/^(#{1,6})\s+(.*)$/);
    const item = line.match(/^\s*[-*]\s+(.*)$/);
    if (!item) list = null;
    if (heading || item || !line.trim()) paragraph = null;
    if (heading) element.append(addText(document.createElement(heading[1].length === 1 ? "h3" : "h4"), heading[2]));
    else if (item) {
      if (!list) element.append((list = document.createElement("ul")));
      list.append(addText(document.createElement("li"), item[1]));
    } else if (line.trim()) {
      if (!paragraph) element.append((paragraph = document.createElement("p")));
      else paragraph.append("\n");
      addText(paragraph, line);
    }
  }
}

/** A duration such as 12 s, 5 min or 2 h 05 min. */
export function inWords(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}
