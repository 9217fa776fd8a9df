"use strict";

// The page asks for what it shows and draws it anew where that has changed; it keeps on asking
// while the run ends, another begins, or the server is gone for a while.
//
// What it is told may come from a stranger's model folder: names and values of any kind are shown
// as text, with escapes for what is no sign, and no object is looked up by them.

const POLL_MS = 2000;
const GRAPHS_EVERY = 3; // polls
const TIMEOUT_MS = 60000; // a very long history takes its time
const LATE_SECONDS = 15;
const REDRAW_MS = 300; // after a change of the window's size

const byId = (id) => document.getElementById(id);
const tags = new Map(); // URL -> ETag of what was drawn last
const stored = sessionStorage;

const view = {
  graphs: null, // the last answer of api/graphs
  others: new Map(), // the same of the runs that are drawn over it, by number
  run: 0, // which of the runs is shown
  zoom: null, // [first, last] iteration, as dragged
  clockOffset: 0, // of the server's clock, ms
  settings: null, // those that may be changed, once they were asked for
  token: "",
  lastPoll: 0,
  asked: 0, // how often graphs were asked for
};

// Asking

// What the server says, or null where it is what was drawn already.
async function ask(url, key) {
  const run = view.run;
  const headers = tags.has(key) ? { "If-None-Match": tags.get(key) } : {};
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  const answer = await fetch(url, { headers, signal, cache: "no-store" });
  const date = Date.parse(answer.headers.get("date"));
  if (date) view.clockOffset = date - Date.now();
  if (answer.status === 304) return null;
  if (answer.status === 401) throw new Error("The page needs its token: open the address that mien monitor printed.");
  if (!answer.ok) throw new Error(`mien monitor answers ${answer.status}; see what it printed.`);
  const values = await answer.json();
  if (run === view.run) tags.set(key, answer.headers.get("etag")); // else it is not drawn
  return values;
}

async function poll(number) {
  const run = view.run;
  try {
    const status = await ask(address("api/status"), "status");
    if (run !== view.run) return; // another was chosen meanwhile
    if (status) view.status = status;
    if (view.status) showStatus(view.status);
    if (number % GRAPHS_EVERY === 0) {
      await askForGraphs();
      if (run !== view.run) return; // else the tag of an answer that is not drawn would be kept
      const analysis = await ask(address("api/analysis"), "analysis");
      if (analysis && run === view.run) showAnalysis(analysis);
    }
    byId("connection").hidden = true;
    view.lastPoll = Date.now();
  } catch (error) {
    const since = view.lastPoll ? ` since ${clock(view.lastPoll / 1000)}` : "";
    const isOurs = error instanceof Error && error.name === "Error";
    say(byId("connection"), isOurs ? error.message : `No answer from mien monitor${since}; trying again.`);
    if (!isOurs) tags.clear(); // another server may answer next
  }
}

async function keepAsking() {
  for (let number = 0; ; number += 1) {
    if (document.hidden) {
      await new Promise((resume) => document.addEventListener("visibilitychange", resume, { once: true }));
      number = 0;
    }
    await poll(number);
    await new Promise((resume) => setTimeout(resume, POLL_MS));
  }
}

async function askForGraphs() {
  const [first, last] = wantedRange();
  const range = first === null ? {} : { first, last };
  const series = wantedSeries();
  const words = series ? { ...range, series: series.join(",") } : range;
  view.asked += 1;
  const number = view.asked;
  const graphs = await ask(address("api/graphs", words), "graphs");
  let isNew = await askForOthers(words);
  if (number !== view.asked) {
    forgetGraphs(); // others were asked for meanwhile, and these have not been drawn
    return;
  }
  if (graphs) {
    view.graphs = graphs;
    listSeries();
    isNew = true;
  }
  if (isNew) drawGraphs();
}

function forgetGraphs() {
  for (const key of [...tags.keys()]) if (key.startsWith("graphs")) tags.delete(key);
}

// The graphs of the runs that are drawn over the one that is shown; true where there is anything new.
async function askForOthers(words) {
  let isNew = false;
  for (const number of overlaid()) {
    const graphs = await ask(address("api/graphs", { ...words, run: number }), `graphs ${number}`);
    if (graphs) view.others.set(number, graphs);
    isNew ||= graphs !== null;
  }
  return isNew;
}

// An address of this server, of the run that is shown unless it says of which.
function address(path, words = {}) {
  return `${path}?${new URLSearchParams({ run: view.run, ...words })}`;
}

// The iterations to draw: all ([null, null]), as zoomed, or a share at the end.
function wantedRange() {
  if (view.zoom) return view.zoom;
  const share = Number(byId("range").value);
  if (share === 1 || !view.graphs?.last) return [null, null];
  const { first, last } = view.graphs;
  return [Math.floor(last - share * (last - first)), last];
}

// Words

const clock = (seconds) => new Date(seconds * 1000).toTimeString().slice(0, 8);

// As ISO 8601 writes it, in the reader's own time.
function moment(seconds) {
  const then = new Date(seconds * 1000);
  const date = [then.getFullYear(), then.getMonth() + 1, then.getDate()].map((part) => String(part).padStart(2, "0"));
  return `${date.join("-")} ${clock(seconds)}`;
}

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (number) => String(number).padStart(2, "0");
  return `${two(Math.floor(whole / 3600))}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

// A value of any kind, as text on one line.
const plain = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : String(value));

// Line ends, control characters and marks that turn the direction of writing, escaped as JSON does.
const printable = (text) =>
  plain(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (letter) => {
    const number = letter.codePointAt(0);
    if (number >= 0xdc80 && number <= 0xdcff) return `\\x${(number - 0xdc00).toString(16)}`; // a byte that is no text
    const escaped = JSON.stringify(letter).slice(1, -1);
    return escaped === letter ? `\\u{${number.toString(16)}}` : escaped;
  });

const isNumber = (value) => typeof value === "number";
const digits = (value, count) => (isNumber(value) ? value.toFixed(count) : "–");
const grouped = (value) => (isNumber(value) ? value.toLocaleString() : "–");

function say(element, text) {
  element.hidden = !text;
  const shown = printable(text);
  if (element.textContent !== shown) element.textContent = shown;
}

function element(name, text, className) {
  const made = document.createElement(name);
  made.textContent = printable(text);
  if (className) made.className = className;
  return made;
}

// Where the run stands

const STATES = new Map([
  ["running", "running"],
  ["paused", "paused"],
  ["stopped", "stopped"],
  ["failed", "failed"],
  ["restored", "went back"],
  ["lost", "ended without a word"],
  ["idle", "not running"],
  ["new", "nothing here yet"],
]);

function showStatus(status) {
  const { step, stop } = status.latest;
  const halted = status.state === "stopped" && stop.exit_code !== 0 && stop.exit_code !== 4;
  const word = halted ? "halted" : STATES.get(status.state);
  byId("state").className = `state ${halted ? "halted" : status.state}`;
  say(byId("state"), word);
  say(byId("name"), status.name);
  say(byId("version"), status.version);
  document.title = printable(`${step ? `#${plain(step.iteration)} ` : ""}${word} – ${status.name}`);
  say(byId("summary"), summary(status));
  showFigures(status);
  showSetup(status);
  showRuns(status);
  showLog(status);
  showPreview(status);
  showRequests(status);
}

// While training is paused it can go on, with other settings or the same, or stop.
function showRequests(status) {
  const isPaused = status.state === "paused";
  byId("requests").hidden = !status.may_ask;
  byId("change").hidden = !status.may_ask || !["running", "paused"].includes(status.state);
  byId("pause").dataset.request = isPaused ? "resume" : "pause";
  say(byId("pause"), isPaused ? "Go on" : "Pause");
  for (const button of document.querySelectorAll("[data-request]")) {
    const canBe = isPaused && ["resume", "stop"].includes(button.dataset.request);
    button.disabled = status.state !== "running" && !canBe;
  }
  if (!byId("change").hidden) listSettings();
}

// The settings that may be changed

async function listSettings() {
  if (view.settings) return;
  view.settings = [];
  try {
    view.settings = await (await fetch(address("api/settings"))).json();
  } catch {
    view.settings = null; // asked for again with the next status
    return;
  }
  byId("setting").replaceChildren(...view.settings.map(({ name }) => choice(name, name)));
  showSetting();
}

// What a setting is in this session, as its start has told.
function presentValue(name) {
  const values = new Map(Object.entries(view.status?.latest.start?.live ?? {}));
  return values.has(name) ? plain(values.get(name)) : "";
}

function showSetting() {
  const name = byId("setting").value;
  byId("value").value = printable(presentValue(name));
  const setting = view.settings?.find((each) => each.name === name);
  say(byId("rule"), setting ? `${setting.values}. ${setting.doc}` : "");
}

function askForChange(event) {
  event.preventDefault();
  const name = byId("setting").value;
  say(byId("change-text"), `Change ${name} from ${presentValue(name)} to ${byId("value").value}?`);
  byId("confirm-change").showModal();
}

function summary(status) {
  const { start, step, stop, crash, restore } = status.latest;
  const parts = [];
  if (status.session) parts.push(`session ${status.session}`);
  if (start) parts.push(`since ${moment(start.time)}`);
  if (status.host) parts.push(`on ${status.host}`);
  if (status.pid) parts.push(`process ${status.pid}`);
  if (status.state === "stopped") parts.push(`ended ${moment(stop.time)}: ${plain(stop.reason)}`);
  if (status.state === "restored") parts.push(`to iteration ${grouped(restore.iteration)} ${moment(restore.time)}`);
  if (status.state === "failed") {
    parts.push(`a failure of mien itself: ${plain(crash.error)}, see ${plain(crash.path)}`);
  }
  const last = status.events.at(-1);
  if (status.state === "lost") parts.push(`last heard of ${moment(last.time)}`);
  const age = step ? (Date.now() + view.clockOffset) / 1000 - step.time : 0;
  if (status.state === "running" && age > LATE_SECONDS) parts.push(`last step told ${duration(age)} ago`);
  if (status.unreadable) parts.push(`${status.unreadable} unreadable lines in the events`);
  return parts.join(" · ");
}

function rankFigures(step) {
  const exchange = isNumber(step.exchange) ? `, exchange ${(100 * step.exchange).toFixed(0)} %` : "";
  return `${step.gpus}${exchange}`;
}

function showFigures(status) {
  const step = status.latest.step ?? { iteration: status.latest.restore?.iteration };
  const isRunning = status.state === "running";
  const figures = [
    ["Iteration", grouped(step.iteration)],
    ["of this session", grouped(step.session_iterations)],
    ["Elapsed", isNumber(step.elapsed_s) ? duration(step.elapsed_s) : "–"],
    ["Loss A", digits(step.loss_a, 5), "side-a"],
    ["Loss B", digits(step.loss_b, 5), "side-b"],
    ["EG/s", digits(step.eg_per_s, 1)],
    ["Data wait", isNumber(step.data_wait) ? `${(100 * step.data_wait).toFixed(1)} %` : "–"],
    ...(isNumber(step.gpus) ? [["GPUs", rankFigures(step)]] : []),
    ["Memory", isNumber(step.memory_mib) ? `${grouped(Math.round(step.memory_mib))} MiB` : "–"],
    ["Time left", isRunning && isNumber(step.seconds_left) ? duration(step.seconds_left) : "–"],
    ["Ends", isRunning && isNumber(step.seconds_left) ? moment(step.time + step.seconds_left) : "–"],
    ["Next save", isRunning ? nextSave(status.latest) : "–"],
    ["Learning rate", isNumber(step.learning_rate) ? step.learning_rate.toExponential(2) : "–"],
  ];
  const list = byId("figures");
  if (!list.children.length) {
    for (const [name, , className] of figures) {
      const pair = document.createElement("div");
      pair.append(element("dt", name), element("dd", "", className));
      list.append(pair);
    }
  }
  figures.forEach(([, value], place) => say(list.children[place].lastChild, value));
  const total = isNumber(step.elapsed_s) && isNumber(step.seconds_left) ? step.elapsed_s + step.seconds_left : 0;
  byId("progress").hidden = !isRunning || !(total > 0);
  if (total > 0) byId("progress").value = step.elapsed_s / total;
}

// When the next save is due, as the last step told; of an older run by its start and last save.
function nextSave({ start, save, step }) {
  if (isNumber(step?.seconds_to_save)) return `about ${clock(step.time + step.seconds_to_save)}`;
  if (isNumber(start?.save_minutes) && start.save_minutes > 0) {
    return `about ${clock((save ?? start).time + 60 * start.save_minutes)}`;
  }
  if (!isNumber(start?.save_interval) || !(start.save_interval > 0) || !isNumber(step?.iteration)) return "–";
  const since = step.iteration % start.save_interval;
  const left = start.save_interval - since;
  return `in ${grouped(left)} iteration${left === 1 ? "" : "s"}`;
}

const onOff = (name, value) => `${name} ${value ? "on" : "off"}`;

// What was told at the start of the session: what decides the result.
const SETUP = [
  ["Trainer", (start) => plain(start.trainer)],
  ["Size", (start) => `${plain(start.input_px)} px in, ${[start.output_px].flat().map(plain).join(", ")} px out`],
  ["Batch", (start) => `${plain(start.batch_size)} a side`],
  ["Precision", (start) => plain(start.precision)],
  ["Losses", (start) => (Array.isArray(start.losses) ? start.losses.map(lossWord).join(", ") : "–")],
  ["Mask", (start) => `${plain(start.mask_type)}, ${start.learn_mask ? "learned" : "not learned"}`],
  ["Augmentation", (start) => ["warp", "flip", "color"].map((name) => onOff(name, start[name])).join(", ")],
  ["Optimizer", (start) => `${plain(start.optimizer)}, rate ${digits(start.learning_rate, 7)}, ${plain(start.schedule)}`],
  ["Device", (start) => `${isNumber(start.gpus) ? `${start.gpus} × ` : ""}${plain(start.device_name)}, ${plain(start.engine)}`],
  ["Faces", (start) => `${grouped(start.faces_a)} of A, ${grouped(start.faces_b)} of B`],
  ["Stage", (start) => (start.stage ? stageWord(start.stage) : "no recipe")],
  ["Average", (start) => averageWord(start) || "none of the weights"],
  ["Changed", (start) => changesWord(start)],
];

const lossWord = (loss) => `${plain(loss?.name)} ${isNumber(loss?.weight) ? `${+(100 * loss.weight).toPrecision(3)}\u00a0%` : ""}`;
const stageWord = (stage) =>
  `${plain(stage.number)} of ${plain(stage.count)}: ${plain(stage.name)} (recipe ${plain(stage.recipe)})`;

function showSetup(status) {
  const { start } = status.latest;
  const shown = JSON.stringify(start ?? null);
  const list = byId("setup");
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  byId("setup-box").hidden = !start;
  list.replaceChildren(
    ...(start ? SETUP : []).flatMap(([name, word]) => {
      const words = word(start);
      if (!words) return [];
      const pair = document.createElement("div");
      pair.className = name.toLowerCase();
      pair.append(element("dt", name), element("dd", words));
      return [pair];
    }),
  );
}

// The runs

function showRuns(status) {
  const names = status.runs;
  byId("runs-box").hidden = names.length < 2;
  const shown = JSON.stringify(names);
  if (names.length < 2 || byId("runs").dataset.shown === shown) return;
  byId("runs").dataset.shown = shown;
  byId("run").replaceChildren(...names.map((name, number) => choice(number, name)));
  byId("run").value = view.run;
  byId("runs").replaceChildren(
    ...names.map((name, number) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.value = number;
      box.addEventListener("change", showRange);
      label.append(box, printable(` ${name}`));
      return label;
    }),
  );
  hideShownRun();
}

function hideShownRun() {
  [...byId("runs").children].forEach((label, number) => {
    label.hidden = number === view.run; // its own curves are there already
  });
}

function choice(value, text) {
  const made = element("option", text);
  made.value = value;
  return made;
}

// Numbers of the runs whose curves are drawn over the one that is shown.
function overlaid() {
  const boxes = [...byId("runs").querySelectorAll("input:checked")];
  return boxes.map((box) => Number(box.value)).filter((number) => number !== view.run);
}

function chooseRun() {
  const before = view.run;
  view.run = Number(byId("run").value);
  // Two that are compared change their places.
  const own = byId("runs").querySelector(`[value="${view.run}"]`);
  byId("runs").querySelector(`[value="${before}"]`).checked ||= own.checked;
  own.checked = false;
  view.zoom = null;
  view.status = null;
  view.graphs = { loss: null, speed: null, sessions: [] };
  view.asked += 1; // what is on its way is of the run before
  tags.clear();
  forgetPreview();
  byId("range").value = "1";
  say(byId("answer"), "");
  for (const id of ["sessions", "total", "log"]) byId(id).replaceChildren();
  delete byId("log").dataset.newest;
  hideShownRun();
  drawGraphs();
  poll(0);
}

// The sessions

function showAnalysis(analysis) {
  say(byId("problem"), [analysis.problem, ...analysis.warnings].filter(Boolean).join(" · "));
  say(byId("earlier"), analysis.earlier ? `${grouped(analysis.earlier)} earlier sessions are in the total alone.` : "");
  byId("sessions").replaceChildren(...analysis.sessions.map((session) => row(session, session.session)));
  byId("total").replaceChildren(...(analysis.total ? [row(analysis.total, "Total")] : []));
}

function row(figures, name) {
  const cells = [
    "",
    figures.start ? moment(figures.start) : "–",
    figures.end ? moment(figures.end) : "–",
    isNumber(figures.elapsed_s) ? duration(figures.elapsed_s) : "–",
    figures.batch_sizes.join(", ") || "–",
    grouped(figures.iterations),
    digits(figures.eg_per_s, 1),
  ];
  const made = document.createElement("tr");
  made.append(...cells.map((text) => element("td", text)));
  const canZoom = isNumber(figures.first) && isNumber(figures.last);
  made.firstChild.append(...(canZoom ? sessionLinks(figures, name) : [printable(name)]));
  return made;
}

// A button that shows the graphs of one session, and its numbers as a file.
function sessionLinks({ first, last }, name) {
  const button = element("button", name, "link");
  button.type = "button";
  button.title = "Show the graphs of this session";
  button.addEventListener("click", () => {
    zoom([first, Math.max(last, first + 1)]);
    byId("loss").scrollIntoView({ block: "center" });
  });
  const file = element("a", "CSV");
  file.href = address("series.csv", { first, last });
  file.download = `session_${Number(name) || 0}.csv`;
  return [button, " ", file];
}

// Requests

async function request(name, fields = {}) {
  const token = view.token || byId("token").value;
  const sheetBefore = view.status?.sheet ?? ""; // a run may have drawn before its answer is here
  say(byId("answer"), "asking…");
  try {
    const answer = await fetch(address(`request/${name}`), {
      method: "POST",
      headers: { "X-Mien-Token": token },
      body: new URLSearchParams(fields),
    });
    const values = await answer.json();
    if (answer.status === 403) askForToken();
    if (answer.ok) keepToken(token);
    if (answer.ok && name === "sheet") awaitSheet(sheetBefore);
    say(byId("answer"), answer.ok ? askedWord(name) : values.error);
  } catch {
    say(byId("answer"), "No answer from mien monitor; was the request made? See the log below.");
  }
}

const ASKED = new Map([
  ["save", "Asked for a save: it is made after the present step."],
  ["preview", "Asked for a preview: it is made after the present step."],
  ["stop", "Asked to stop: the run saves and ends."],
  ["pause", "Asked to pause: the run saves, and frees its memory."],
  ["resume", "Asked to go on."],
  ["change", "Asked for the change: see the log below."],
  ["sheet", "Asked for a sheet: it is drawn after the present step, and shown when it is done."],
]);

function askedWord(name) {
  const isLater = name === "change" && view.status?.state === "paused";
  return isLater ? "Asked for the change: it is made when training goes on." : ASKED.get(name);
}

function keepToken(token) {
  view.token = token;
  stored.setItem("mien-token", token);
  byId("token-row").hidden = true;
}

function askForToken() {
  view.token = "";
  stored.removeItem("mien-token");
  byId("token-row").hidden = false;
  byId("token").focus();
}

// The address that was printed leads here with the token in its fragment.
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) history.replaceState(null, "", location.pathname);
  const token = given || stored.getItem("mien-token");
  if (token) keepToken(token);
}

function listen() {
  byId("smoothing").addEventListener("input", () => {
    say(byId("smoothing-value"), Number(byId("smoothing").value).toFixed(2));
    drawLoss();
  });
  byId("log-axis").addEventListener("change", () => view.graphs && drawLoss());
  byId("range").addEventListener("change", () => {
    view.zoom = null;
    if (view.graphs) showRange();
  });
  byId("run").addEventListener("change", chooseRun);
  byId("lower").addEventListener("change", drawLower);
  listenToPreview();
  byId("requests").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-request]")) {
    button.addEventListener("click", () => {
      const name = button.dataset.request; // that of the pause is not always the same
      if (name === "stop") byId("confirm").showModal();
      else request(name);
    });
  }
  byId("setting").addEventListener("change", showSetting);
  byId("change").addEventListener("submit", askForChange);
  byId("confirm-change").addEventListener("close", () => {
    const change = `${byId("setting").value}=${byId("value").value}`;
    if (byId("confirm-change").returnValue === "change") request("change", { change });
    byId("confirm-change").returnValue = "";
  });
  byId("confirm").addEventListener("close", () => {
    if (byId("confirm").returnValue === "stop") request("stop");
    byId("confirm").returnValue = "";
  });
  // After plotly's own resizing, which leaves the legend where it was.
  window.addEventListener("resize", () => setTimeout(() => view.graphs && drawGraphs(), REDRAW_MS));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (view.graphs) showRange();
  });
}

function begin() {
  takeToken();
  listen();
  view.graphs = { loss: null, speed: null, sessions: [] };
  drawGraphs();
  for (const id of ["loss", "speed"]) byId(id).on("plotly_relayout", zoomed);
  keepAsking();
}

begin();
