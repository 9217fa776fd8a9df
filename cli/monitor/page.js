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

const byId = (id) => document.getElementById(id);
const tags = new Map(); // URL -> ETag of what was drawn last
const stored = sessionStorage;

const view = {
  graphs: null, // the last answer of api/graphs
  zoom: null, // [first, last] iteration, as dragged
  clockOffset: 0, // of the server's clock, ms
  preview: null,
  token: "",
  lastPoll: 0,
  asked: 0, // how often graphs were asked for
};

// Asking

// What the server says, or null where it is what was drawn already.
async function ask(url, key) {
  const headers = tags.has(key) ? { "If-None-Match": tags.get(key) } : {};
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  const answer = await fetch(url, { headers, signal, cache: "no-store" });
  const date = Date.parse(answer.headers.get("date"));
  if (date) view.clockOffset = date - Date.now();
  if (answer.status === 304) return null;
  if (answer.status === 401) throw new Error("The page needs its token: open the address that mien monitor printed.");
  if (!answer.ok) throw new Error(`mien monitor answers ${answer.status}; see what it printed.`);
  const values = await answer.json();
  tags.set(key, answer.headers.get("etag"));
  return values;
}

async function poll(number) {
  try {
    const status = await ask("api/status", "status");
    if (status) view.status = status;
    if (view.status) showStatus(view.status);
    if (number % GRAPHS_EVERY === 0) {
      await askForGraphs();
      const analysis = await ask("api/analysis", "analysis");
      if (analysis) showAnalysis(analysis);
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
  const range = first === null ? "" : `?first=${first}&last=${last}`;
  view.asked += 1;
  const number = view.asked;
  const graphs = await ask(`api/graphs${range}`, "graphs");
  if (!graphs || number !== view.asked) return; // another range was asked for meanwhile
  view.graphs = graphs;
  drawLoss();
  drawSpeed();
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

const clock = (seconds) =>
  new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const moment = (seconds) =>
  new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

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
  showLog(status);
  showPreview(status);
  byId("requests").hidden = !status.may_ask;
  for (const button of document.querySelectorAll("[data-request]")) {
    button.disabled = status.state !== "running";
  }
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
    ["Loss A", digits(step.loss_a, 5), "side-a"],
    ["Loss B", digits(step.loss_b, 5), "side-b"],
    ["EG/s", digits(step.eg_per_s, 1)],
    ["Data wait", isNumber(step.data_wait) ? `${(100 * step.data_wait).toFixed(1)} %` : "–"],
    ...(isNumber(step.gpus) ? [["GPUs", rankFigures(step)]] : []),
    ["Memory", isNumber(step.memory_mib) ? `${grouped(Math.round(step.memory_mib))} MiB` : "–"],
    ["Time left", isRunning && isNumber(step.seconds_left) ? duration(step.seconds_left) : "–"],
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
}

function showPreview(status) {
  const told = status.latest.preview;
  say(byId("preview-age"), told ? `iteration ${grouped(told.iteration)}, ${clock(told.time)}` : "");
  byId("no-preview").hidden = status.preview !== null;
  byId("enlarge").hidden = status.preview === null;
  if (status.preview === view.preview) return;
  view.preview = status.preview;
  if (status.preview) {
    byId("preview").src = `preview.png?${status.preview}`;
    if (byId("large").open) byId("large-picture").src = byId("preview").src;
  }
}

// The log

const LINES = new Map([
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
  ["preview", (event) => `Preview of iteration ${plain(event.iteration)}`],
  ["restore", (event) => `Went back to iteration ${plain(event.iteration)}: what followed it is undone`],
  ["notice", (event) => `Note: ${plain(event.message)}`],
  ["warning", (event) => `Warning: ${plain(event.message)}`],
  [
    "stop",
    (event) =>
      `Stopped at iteration ${plain(event.iteration)}: ${plain(event.reason)} (exit code ${plain(event.exit_code)})`,
  ],
]);

function line(event) {
  const known = LINES.get(event.event);
  if (known) return known(event);
  const facts = Object.entries(event).filter(([name, value]) => !["event", "time"].includes(name) && value !== null);
  const words = facts.map(([name, value]) => `${name.replaceAll("_", " ")} ${isNumber(value) ? +value.toPrecision(5) : plain(value)}`);
  return `${event.event[0]?.toUpperCase() ?? ""}${event.event.slice(1)}: ${words.join(", ")}`;
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

// The sessions

function showAnalysis(analysis) {
  say(byId("problem"), [analysis.problem, ...analysis.warnings].filter(Boolean).join(" · "));
  say(byId("earlier"), analysis.earlier ? `${grouped(analysis.earlier)} earlier sessions are in the total alone.` : "");
  byId("sessions").replaceChildren(...analysis.sessions.map((session) => row(session, session.session)));
  byId("total").replaceChildren(...(analysis.total ? [row(analysis.total, "Total")] : []));
}

function row(figures, name) {
  const cells = [
    name,
    figures.start ? moment(figures.start) : "–",
    figures.end ? moment(figures.end) : "–",
    isNumber(figures.elapsed_s) ? duration(figures.elapsed_s) : "–",
    figures.batch_sizes.join(", ") || "–",
    grouped(figures.iterations),
    digits(figures.eg_per_s, 1),
  ];
  const made = document.createElement("tr");
  made.append(...cells.map((text) => element("td", text)));
  return made;
}

// The graphs

const DASHES = ["solid", "dash", "dot", "dashdot"];

// {side, name, dash} of batch_face_a, batch_face_b_2, batch_mask_a.
function kind(tag) {
  const [, what, side, output] = /^batch_(face|mask)_([ab])(?:_(\d+))?$/.exec(tag) ?? [null, tag, "", ""];
  const number = Number(output ?? 0);
  const name = `${side.toUpperCase()} ${what}${output ? ` ${output}` : ""}`;
  return { side, name, dash: what === "mask" ? "dot" : DASHES[Math.max(0, number - 1) % DASHES.length] };
}

// Exponential average of what is there: s = (1 - amount) x + amount s, beginning with the first x.
function smoothed(values, amount) {
  let average = null;
  return values.map((value) => {
    if (value === null) return null;
    average = average === null ? value : (1 - amount) * value + amount * average;
    return average;
  });
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function layout(yaxis) {
  const isNarrow = window.innerWidth < 480;
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  const [first, last] = wantedRange();
  const sessions = view.graphs?.sessions ?? [];
  return {
    margin: { l: isNarrow ? 44 : 56, r: 10, t: 34, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--ink"), family: "system-ui, sans-serif", size: isNarrow ? 11 : 13 },
    legend: { orientation: "h", x: 0.5, xanchor: "center", y: isNarrow ? -0.22 : -0.18, yanchor: "top" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--faint"), activecolor: color("--ink") },
    hovermode: "x unified",
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink") } },
    // A finger scrolls the page; it zooms after a touch on the graph's own zoom button.
    dragmode: view.dragmode ?? (matchMedia("(pointer: coarse)").matches ? false : "zoom"),
    xaxis: {
      ...axis,
      title: { text: "iteration", standoff: 6 },
      tickformat: ",~s",
      hoverformat: ",d",
      ...(first === null ? { autorange: true } : { range: [first, last] }),
    },
    yaxis: { ...axis, fixedrange: true, rangemode: "normal", ...yaxis },
    // A dotted line where a session begins.
    shapes: sessions.map((session) => ({
      type: "line",
      xref: "x",
      yref: "paper",
      x0: session.first,
      x1: session.first,
      y0: 0,
      y1: 1,
      line: { color: color("--faint"), width: 1, dash: "dot" },
    })),
  };
}

const CONFIG = {
  displaylogo: false,
  displayModeBar: true,
  modeBarButtons: [["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "autoScale2d"], ["toImage"]],
  doubleClick: "autosize",
  responsive: true,
};

function drawLoss() {
  const loss = view.graphs.loss;
  const amount = Number(byId("smoothing").value);
  const traces = [];
  for (const [tag, values] of Object.entries(loss?.losses ?? {})) {
    const { side, name, dash } = kind(tag);
    const paint = color(side === "b" ? "--side-b" : "--side-a");
    const common = { x: loss.iterations, mode: "lines", legendgroup: tag, name };
    if (amount > 0) {
      const line = { color: paint, width: 1 };
      traces.push({ ...common, y: values, line, opacity: 0.25, showlegend: false, hoverinfo: "skip" });
    }
    traces.push({
      ...common,
      y: smoothed(values, amount),
      line: { color: paint, width: 2, dash },
      hovertemplate: "%{y:.5f}",
    });
  }
  const type = byId("log-axis").checked ? "log" : "linear";
  Plotly.react("loss", traces, layout({ type, autorange: true, tickformat: "~g" }), CONFIG);
  const over = loss?.per_point ?? 1;
  say(
    byId("loss-note"),
    !loss?.iterations.length
      ? "No losses have been logged yet; they reach the disk twice a minute."
      : over > 1
        ? `Each point is the mean of ${grouped(over)} iterations: zoom in for finer ones.`
        : "Each point is one iteration.",
  );
}

function drawSpeed() {
  const speed = view.graphs.speed;
  const traces = speed
    ? [
        {
          x: speed.iterations,
          y: speed.eg_per_s,
          mode: speed.iterations.length < 3 ? "lines+markers" : "lines",
          line: { color: color("--good"), width: 1.5 },
          name: "EG/s",
          hovertemplate: "%{y:,.1f}",
          connectgaps: false,
        },
      ]
    : [];
  Plotly.react("speed", traces, layout({ rangemode: "tozero", autorange: true }), CONFIG);
}

// A drag along the axis of either graph is a zoom of both; a double click shows all again.
function zoomed(change) {
  if (change.dragmode !== undefined) view.dragmode = change.dragmode;
  const from = change["xaxis.range[0]"] ?? change["xaxis.range"]?.[0];
  const to = change["xaxis.range[1]"] ?? change["xaxis.range"]?.[1];
  if (from !== undefined) {
    const first = Math.max(0, Math.floor(from));
    zoom([first, Math.max(first + 1, Math.ceil(to))]);
  } else if (change["xaxis.autorange"]) {
    zoom(null);
  }
}

async function zoom(range) {
  view.zoom = range;
  byId("range").value = range ? "" : "1";
  await showRange();
}

async function showRange() {
  drawLoss();
  drawSpeed();
  tags.delete("graphs");
  await askForGraphs().catch(() => undefined); // the next poll tells what is wrong
}

// Requests

async function request(name) {
  const token = view.token || byId("token").value;
  say(byId("answer"), "asking…");
  try {
    const answer = await fetch(`request/${name}`, { method: "POST", headers: { "X-Mien-Token": token } });
    const values = await answer.json();
    if (answer.status === 403) askForToken();
    if (answer.ok) keepToken(token);
    say(byId("answer"), answer.ok ? ASKED.get(name) : values.error);
  } catch {
    say(byId("answer"), "No answer from mien monitor; was the request made? See the log below.");
  }
}

const ASKED = new Map([
  ["save", "Asked for a save: it is made after the present step."],
  ["preview", "Asked for a preview: it is made after the present step."],
  ["stop", "Asked to stop: the run saves and ends."],
]);

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
    if (view.graphs) drawLoss();
  });
  byId("log-axis").addEventListener("change", () => view.graphs && drawLoss());
  byId("range").addEventListener("change", () => {
    view.zoom = null;
    if (view.graphs) showRange();
  });
  byId("enlarge").addEventListener("click", () => {
    byId("large-picture").src = byId("preview").src;
    byId("large").showModal();
  });
  byId("requests").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-request]")) {
    const name = button.dataset.request;
    button.addEventListener("click", () => (name === "stop" ? byId("confirm").showModal() : request(name)));
  }
  byId("confirm").addEventListener("close", () => {
    if (byId("confirm").returnValue === "stop") request("stop");
    byId("confirm").returnValue = "";
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (view.graphs) showRange();
  });
}

function begin() {
  takeToken();
  listen();
  view.graphs = { loss: null, speed: null, sessions: [] };
  drawLoss();
  drawSpeed();
  for (const id of ["loss", "speed"]) byId(id).on("plotly_relayout", zoomed);
  keepAsking();
}

begin();
