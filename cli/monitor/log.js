"use strict";

// The log: what the run has told, in plain words; beside page.js, whose words it uses.

// A value of any kind in words; nothing of it is left out.
function inWords(value) {
  if (value === null || value === undefined) return "none";
  if (value === "") return '""';
  if (isNumber(value)) return String(Number.isInteger(value) ? value : +value.toPrecision(7));
  if (typeof value !== "object") return String(value);
  const parts = Array.isArray(value) ? value.map(inWords) : Object.entries(value).map(factWord);
  return parts.length === 1 ? parts[0] : `(${parts.join(", ")})`;
}

const factWord = ([name, value]) => `${name.replaceAll("_", " ")} ${inWords(value)}`;
const sentence = (words) => `${words[0]?.toUpperCase() ?? ""}${words.slice(1)}`;

function averageWord(start) {
  if (start.optimizer === "schedule-free") return "of the weights, by schedule-free itself";
  return isNumber(start.ema) && start.ema > 0 ? `of the weights, decay ${inWords(start.ema)}` : "";
}

// What is other than in the last session.
const changesWord = (start) => (Array.isArray(start.changes) ? start.changes.map(changeWord).join("; ") : "");

function changeWord(change) {
  const note = change?.note ? ` (${plain(change.note)})` : "";
  return `${plain(change?.name)} ${inWords(change?.old)} → ${inWords(change?.new)}${note}`;
}

function startWord(start) {
  const session = isNumber(start.session) ? ` session ${start.session}` : "";
  const at = isNumber(start.iteration) ? ` at iteration ${grouped(start.iteration)}` : "";
  const batch = isNumber(start.batch_size) ? `batch ${start.batch_size} a side` : "";
  const average = averageWord(start) && `average ${averageWord(start)}`;
  const facts = [start.trainer, batch, start.precision, average].filter(Boolean).map(plain);
  const changes = changesWord(start) && `; changed since the last session: ${changesWord(start)}`;
  return `Started${session}${at}: ${facts.join(", ")}${changes}`;
}

const of = (event) => `of iteration ${plain(event.iteration)}`;
const at = (event) => `at iteration ${plain(event.iteration)}`;

const LINES = new Map([
  ["start", startWord],
  [
    "step",
    (event) =>
      `#${plain(event.iteration)}  loss A ${digits(event.loss_a, 5)}, B ${digits(event.loss_b, 5)}, ${digits(event.eg_per_s, 1)} EG/s`,
  ],
  [
    "save",
    (event) =>
      `Saved iteration ${plain(event.iteration)}` +
      (isNumber(event.seconds) ? ` in ${digits(event.seconds, 1)} s` : "") +
      (isNumber(event.mean_loss) ? `, mean loss ${digits(event.mean_loss, 5)}` : ""),
  ],
  ["preview", (event) => `Preview ${of(event)}`],
  ["sheet", (event) => `Sheet ${of(event)}`],
  ["snapshot", (event) => `Snapshot ${of(event)}: ${plain(event.path)}`],
  ["timelapse", (event) => `Time-lapse: picture ${of(event)}`],
  [
    "evaluate",
    (event) => `Measured on held-out faces ${at(event)}: ${factsOf(event, ["iteration"])}`,
  ],
  ["found_rates", (event) => `Learning rates found: ${factsOf(event.rates ?? {}, [])}; ${plain(event.chosen)} is chosen`],
  ["stage", (event) => `Next stage: ${plain(event.reason)}`],
  [
    "change",
    (event) =>
      `Changed ${plain(event.name)} from ${plain(event.old)} to ${plain(event.new)} ${at(event)}, by ${plain(event.by)}`,
  ],
  ["pause", (event) => `Paused ${at(event)}`],
  ["resume", (event) => `Went on ${at(event)}`],
  ["restore", (event) => `Went back to iteration ${plain(event.iteration)}: what followed it is undone`],
  ["notice", (event) => `Note: ${plain(event.message)}`],
  ["warning", (event) => `Warning: ${plain(event.message)}`],
  ["crash", (event) => `A failure of mien itself: ${plain(event.error)}, see ${plain(event.path)}`],
  [
    "stop",
    (event) =>
      `Stopped ${at(event)}: ${plain(event.reason)} (exit code ${plain(event.exit_code)})`,
  ],
]);

// What an event holds beside these, with its names.
function factsOf(event, besides) {
  const facts = Object.entries(event).filter(([name, value]) => !["event", "time", ...besides].includes(name) && value !== null);
  return facts.map(factWord).join(", ");
}

function line(event) {
  const known = LINES.get(event.event);
  return known ? known(event) : `${sentence(event.event)}: ${factsOf(event, [])}`;
}

function showLog(status) {
  const log = byId("log");
  const newest = JSON.stringify(status.events.slice(-20)) + status.events.length;
  if (log.dataset.newest === newest) return;
  log.dataset.newest = newest;
  const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  log.replaceChildren(
    ...status.events.map((event) => {
      const entry = element("li", "", ["warning", "step", "stop"].find((name) => name === event.event));
      entry.append(element("time", clock(event.time)), printable(` ${line(event)}`));
      return entry;
    }),
  );
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}
