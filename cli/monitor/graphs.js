"use strict";

// The two graphs and what they show; beside page.js, whose words and values it uses.

const DASHES = ["solid", "dash", "dot", "dashdot"];

// {side, name, dash} of batch_face_a, batch_face_b_2, batch_mask_a, batch_weighted_a/ssim.
function kind(tag) {
  const found = /^batch_(face|mask|weighted|unweighted)_([ab])(?:_(\d+))?(?:\/(.+))?$/.exec(tag);
  const [, what, side, output, term] = found ?? [null, tag, "", "", ""];
  const words = [side.toUpperCase(), term ?? what, output, what === "unweighted" ? "unweighted" : ""];
  const dash = what === "mask" || term ? "dot" : DASHES[Math.max(0, Number(output ?? 0) - 1) % DASHES.length];
  return { side, name: words.filter(Boolean).join(" "), dash };
}

// A name as plotly shows it, which takes some HTML for its own.
const label = (text) => printable(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

// Series

// What is drawn in the upper graph; null: what the server chooses.
function wantedSeries() {
  const boxes = [...byId("series").querySelectorAll("input")];
  if (!boxes.length) return null;
  return ["learning_rate", ...boxes.filter((box) => box.checked).map((box) => box.value)];
}

// Boxes for what was logged as a loss, and choices for what has a scale of its own.
function listSeries() {
  const { available = [], measured = {}, memory, loss } = view.graphs;
  const losses = available.filter((tag) => tag !== "learning_rate");
  const chosen = new Set(Object.keys(loss?.losses ?? {}));
  fill(byId("series"), losses, () =>
    losses.map((tag) => {
      const made = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.value = tag;
      box.checked = chosen.has(tag);
      box.addEventListener("change", showRange);
      made.append(box, ` ${kind(tag).name}`);
      return made;
    }),
  );
  byId("series-box").hidden = !losses.length;
  const lower = ["eg_per_s", ...available.filter((tag) => tag === "learning_rate"), ...Object.keys(measured)];
  if (memory?.iterations.length) lower.push("memory_mib");
  const before = byId("lower").value;
  fill(byId("lower"), lower, () => lower.map((tag) => choice(tag, LOWER.get(tag) ?? tag.replace("evaluate/", "held out: "))));
  if (lower.includes(before)) byId("lower").value = before;
}

// The elements made anew where what they stand for has changed.
function fill(parent, names, make) {
  const key = names.join("\n");
  if (parent.dataset.names === key) return;
  parent.dataset.names = key;
  parent.replaceChildren(...make());
}

const LOWER = new Map([
  ["eg_per_s", "speed (EG/s)"],
  ["learning_rate", "learning rate"],
  ["memory_mib", "peak memory (MiB)"],
]);

// Exponential mean of what is there: s = (1 - amount) x + amount s from 0 on, divided by the sum of
// the weights so far, so that the first value counts no more than any other.
function smoothed(values, amount) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = (1 - amount) * value + amount * sum;
    weight = 1 - amount + amount * weight;
    return sum / weight;
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

const PAINTS = ["--run-1", "--run-2", "--run-3", "--run-4", "--run-5", "--run-6"];

// Every run whose curves are drawn: [name where there are several, its graphs, its colour].
function drawn() {
  const others = overlaid();
  const names = view.status?.runs ?? [];
  const own = [others.length ? `${names[view.run]}: ` : "", view.graphs, null];
  return [own, ...others.map((number, place) => [`${names[number]}: `, view.others.get(number), PAINTS[place % PAINTS.length]])];
}

function drawGraphs() {
  drawLoss();
  drawLower();
}

function drawLoss() {
  const amount = Number(byId("smoothing").value);
  const traces = drawn().flatMap(([name, graphs, paint]) => lossTraces(name, graphs?.loss, paint, amount));
  const type = byId("log-axis").checked ? "log" : "linear";
  Plotly.react("loss", traces, layout({ type, autorange: true, tickformat: "~g" }), CONFIG);
  const loss = view.graphs.loss;
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

function lossTraces(run, loss, own, amount) {
  const traces = [];
  for (const [tag, values] of Object.entries(loss?.losses ?? {})) {
    if (tag === "learning_rate") continue;
    const { side, name, dash: usual } = kind(tag);
    // Another run has one colour for both sides.
    const dash = own && side === "b" && usual === "solid" ? "dash" : usual;
    const paint = color(own ?? (side === "b" ? "--side-b" : "--side-a"));
    const common = { x: loss.iterations, mode: "lines", legendgroup: run + tag, name: label(run + name) };
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
  return traces;
}

// {x, y} of what the lower graph shows of a run.
function lowerPoints(graphs, tag) {
  const found = {
    eg_per_s: () => [graphs?.speed?.iterations, graphs?.speed?.eg_per_s],
    memory_mib: () => [graphs?.memory?.iterations, graphs?.memory?.values],
    learning_rate: () => [graphs?.loss?.iterations, graphs?.loss?.losses.learning_rate],
  };
  const measured = graphs?.measured?.[tag];
  const [x, y] = Object.hasOwn(found, tag) ? found[tag]() : [measured?.iterations, measured?.values];
  return { x: x ?? [], y: y ?? [] };
}

function drawLower() {
  const tag = byId("lower").value || "eg_per_s";
  const isSpeed = tag === "eg_per_s";
  const traces = drawn()
    .map(([run, graphs, paint]) => ({ run, paint, ...lowerPoints(graphs, tag) }))
    .filter(({ x }) => x.length)
    .map(({ run, paint, x, y }) => ({
      x,
      y,
      mode: x.length < 3 || tag.startsWith("evaluate/") ? "lines+markers" : "lines",
      line: { color: color(paint ?? "--good"), width: 1.5 },
      name: label(run + (isSpeed ? "EG/s" : (LOWER.get(tag) ?? tag))),
      hovertemplate: isSpeed ? "%{y:,.1f}" : "%{y:.5g}",
      connectgaps: false,
    }));
  const all = layout({ rangemode: isSpeed ? "tozero" : "normal", autorange: true });
  all.legend.y = -0.34; // of a graph that is low
  Plotly.react("speed", traces, all, CONFIG);
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
  drawGraphs();
  forgetGraphs();
  await askForGraphs().catch(() => undefined); // the next poll tells what is wrong
}
