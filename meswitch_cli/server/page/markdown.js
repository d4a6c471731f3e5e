// Markdown as models write it, made into elements. Nothing is ever parsed as HTML: text goes in as text, links lead to
// http, https and mailto alone, pictures are shown as links. So whatever a model says cannot run.

import { copyButton, element } from "./dom.js";

const DEEPEST = 12;
// Beyond this a paragraph is shown as it is: the search for pairs of marks takes time that grows faster than its length.
const LONGEST = 20000;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = new RegExp(
  [
    "(?<ticks>`+)(?<code>[^`]|[^`].*?[^`])\\k<ticks>(?!`)",
    "\\*\\*(?=\\S)(?<strong>.+?)(?<=\\S)\\*\\*",
    "~~(?=\\S)(?<deleted>.+?)(?<=\\S)~~",
    "\\*(?=[^\\s*])(?<em>.+?)(?<=[^\\s*])\\*(?!\\*)",
    "(?<!\\w)_(?=[^\\s_])(?<em2>.+?)(?<=[^\\s_])_(?!\\w)",
    "!?\\[(?<label>[^\\]\\n]+)\\]\\((?<target>[^\\s()]+(?:\\([^\\s()]*\\))?)\\)",
    "(?<address>https?://[^\\s<>\"'`)\\]]*[^\\s<>\"'`)\\].,;:!?])",
  ].join("|"),
  "gs",
);

export function render(text) {
  const whole = document.createDocumentFragment();
  blocks(text.split("\n"), whole, 0);
  return whole;
}

function blocks(lines, parent, depth) {
  if (depth > DEEPEST) {
    parent.append(element("p", "", lines.join("\n")));
    return;
  }
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      i += 1;
    } else if (fence) {
      const from = ++i;
      while (i < lines.length && !closes(lines[i], fence[1])) i += 1;
      parent.append(codeBlock(lines.slice(from, i).join("\n"), fence[2]));
      i += 1;
    } else if (heading) {
      // The page has a heading above all messages, so those of an answer begin at the third level.
      parent.append(inline(heading[2], element(`h${Math.min(6, heading[1].length + 2)}`), depth));
      i += 1;
    } else if (RULE.test(line)) {
      parent.append(element("hr"));
      i += 1;
    } else if (QUOTE.test(line)) {
      const from = i;
      while (i < lines.length && QUOTE.test(lines[i])) i += 1;
      const quote = element("blockquote");
      blocks(lines.slice(from, i).map((quoted) => quoted.replace(QUOTE, "")), quote, depth + 1);
      parent.append(quote);
    } else if (ITEM.test(line)) {
      i = list(lines, i, parent, depth);
    } else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE_RULE.test(lines[i + 1])) {
      i = table(lines, i, parent, depth);
    } else {
      const from = i++;
      while (i < lines.length && lines[i].trim() && !begins(lines[i])) i += 1;
      parent.append(inline(lines.slice(from, i).join("\n"), element("p"), depth));
    }
  }
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

const closes = (line, mark) => line.trim().startsWith(mark) && !line.trim().slice(mark.length).replaceAll(mark[0], "");

function list(lines, start, parent, depth) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul");
  if (ordered && parseInt(mark, 10) !== 1) made.start = parseInt(mark, 10);
  let i = start;
  while (i < lines.length) {
    const found = ITEM.exec(lines[i]);
    if (!found || found[1].length !== indent.length || /\d/.test(found[2]) !== ordered) break;
    const content = [lines[i].slice(found[0].length)];
    i += 1;
    // What is indented further belongs to the item, and so do blank lines before such a line.
    while (i < lines.length) {
      const next = lines[i].trim() ? lines[i] : lines.slice(i).find((line) => line.trim());
      if (next === undefined) break;
      const deep = next.length - next.trimStart().length;
      const lazy = lines[i].trim() && lines[i - 1].trim() && !begins(lines[i]);
      if (deep <= indent.length && !lazy) break;
      content.push(lines[i].slice(Math.min(deep, found[0].length)));
      i += 1;
    }
    const item = element("li");
    blocks(content, item, depth + 1);
    // A single paragraph is the item's own text.
    if (item.childNodes.length && item.firstChild.tagName === "P") item.firstChild.replaceWith(...item.firstChild.childNodes);
    made.append(item);
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] || "")) i += 1;
  }
  parent.append(made);
  return i;
}

function table(lines, start, parent, depth) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const made = element("table");
  const wide = cells(lines[start]).length;
  const row = (line, tag) => {
    const found = cells(line);
    const line_ = element("tr");
    for (let column = 0; column < wide; column += 1) line_.append(inline(found[column] || "", element(tag), depth));
    return line_;
  };
  const head = element("thead");
  head.append(row(lines[start], "th"));
  const body = element("tbody");
  let i = start + 2;
  while (i < lines.length && lines[i].includes("|") && lines[i].trim()) body.append(row(lines[i++], "td"));
  made.append(head, body);
  const frame = element("div", "table");
  frame.append(made);
  parent.append(frame);
  return i;
}

function codeBlock(text, language) {
  const made = element("div", "code");
  const head = element("div", "code-head");
  head.append(element("span", "", language), copyButton(() => text));
  const pre = element("pre");
  pre.tabIndex = 0;
  pre.append(element("code", "", text));
  made.append(head, pre);
  return made;
}

function inline(text, parent, depth) {
  if (text.length > LONGEST || depth > DEEPEST) {
    parent.append(text);
    return parent;
  }
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    parent.append(text.slice(last, match.index));
    last = match.index + match[0].length;
    const { code, strong, deleted, em, em2, label, target, address } = match.groups;
    if (code !== undefined) parent.append(element("code", "", code.replace(/^ (.+) $/, "$1")));
    else if (strong !== undefined) parent.append(inline(strong, element("strong"), depth + 1));
    else if (deleted !== undefined) parent.append(inline(deleted, element("del"), depth + 1));
    else if (em !== undefined || em2 !== undefined) parent.append(inline(em ?? em2, element("em"), depth + 1));
    else parent.append(link(label ?? address, target ?? address, match[0]));
  }
  parent.append(text.slice(last));
  return parent;
}

function link(label, target, otherwise) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return document.createTextNode(otherwise);
  const made = element("a", "", label);
  made.href = target;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}
