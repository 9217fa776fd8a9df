"use strict";

// The preview: the newest as the run drew it, or one of those that it has kept, alone or beside
// another, in any size; beside page.js, whose words and values it uses.

const NEAREST_ZOOM = 16; // how often a pixel of the picture is as wide as one of the screen
const FARTHEST_ZOOM = 0.05;

const chosen = {
  at: null, // iteration of the kept preview that is shown; null: the newest one
  zoom: null, // of the large picture; null: as it fits
  awaited: null, // the sheet that was there when another was asked for; null: none was
};

function forgetPreview() {
  chosen.at = chosen.awaited = null;
  byId("other").value = "";
  byId("sheet").checked = false;
}

// The sheet that the run was asked for is shown once it is there.
function awaitSheet(before) {
  chosen.awaited = before;
}

function takeSheet({ sheet }) {
  byId("sheet-row").hidden = !sheet;
  if (!sheet) byId("sheet").checked = false;
  if (!sheet || chosen.awaited === null || sheet === chosen.awaited) return;
  chosen.awaited = null;
  byId("sheet").checked = true;
  say(byId("answer"), "The sheet is drawn, and shown as the preview.");
}

function showPreview(status) {
  const { kept } = status;
  takeSheet(status);
  if (!kept.includes(chosen.at)) chosen.at = null; // it has been thinned out
  const slider = byId("history");
  slider.max = kept.length; // one after the last kept one stands for the newest
  slider.value = chosen.at === null ? kept.length : kept.indexOf(chosen.at);
  byId("history-box").hidden = !kept.length;
  fill(byId("other"), ["", ...kept], () => [choice("", "nothing"), ...kept.map((at) => choice(at, grouped(at)))]);
  const source = previewAddress(status);
  byId("no-preview").hidden = source !== null;
  byId("enlarge").hidden = byId("download").hidden = source === null;
  say(byId("preview-age"), shownWords(status));
  if (source === null || source === byId("preview").getAttribute("src")) return;
  say(byId("preview-problem"), "");
  byId("preview").src = source;
  byId("download").href = source;
  byId("download").download = byId("sheet").checked ? "sheet.png" : `preview_${shownAt(status) ?? "newest"}.png`;
  if (byId("large").open) byId("large-picture").src = source;
}

// Iteration of the kept preview that is shown; null where it is the run's own newest picture.
function shownAt({ kept, preview }) {
  const isAsDrawn = !byId("mask").value && !byId("other").value;
  if (chosen.at !== null || (isAsDrawn && preview !== null)) return chosen.at;
  return kept.at(-1) ?? null;
}

function toldWords(event) {
  return event ? `iteration ${grouped(event.iteration)}, ${moment(event.time)}` : "";
}

function shownWords(status) {
  if (byId("sheet").checked) return `sheet of ${toldWords(status.latest.sheet) || "an earlier session"}`;
  const at = shownAt(status);
  const other = byId("other").value;
  if (at === null) return status.preview ? toldWords(status.latest.preview) : "";
  return other ? `iterations ${grouped(at)} and ${grouped(Number(other))}` : `iteration ${grouped(at)}, as it was kept`;
}

function previewAddress(status) {
  if (byId("sheet").checked) return address("sheet.png", { of: status.sheet });
  const at = shownAt(status);
  if (at === null) return status.preview ? address("preview.png", { of: status.preview }) : null;
  const enlarge = byId("pixels").checked ? "nearest" : "lanczos";
  const words = { at, enlarge, mask: byId("mask").value || "off" };
  return address("kept.png", byId("other").value ? { ...words, other: byId("other").value } : words);
}

function showAgain() {
  byId("preview").classList.toggle("pixels", byId("pixels").checked);
  byId("large-picture").classList.toggle("pixels", byId("pixels").checked);
  if (view.status) showPreview(view.status);
}

// Another of the kept previews; by its place in the row of them.
function choosePreview(place) {
  byId("sheet").checked = false;
  const kept = view.status?.kept ?? [];
  chosen.at = kept[Math.max(0, place)] ?? null;
  showAgain();
}

// Enlarging

// Show the large picture in a size, and what is at a point of the window still there.
function zoomPicture(zoom, x, y) {
  const image = byId("large-picture");
  const before = image.getBoundingClientRect();
  const box = image.parentElement.getBoundingClientRect();
  const [left, top] = [x ?? box.x + box.width / 2, y ?? box.y + box.height / 2];
  const [across, down] = [(left - before.x) / before.width, (top - before.y) / before.height];
  chosen.zoom = zoom === null ? null : Math.min(NEAREST_ZOOM, Math.max(FARTHEST_ZOOM, zoom));
  image.classList.toggle("fits", chosen.zoom === null);
  image.style.width = chosen.zoom === null ? "" : `${image.naturalWidth * chosen.zoom}px`;
  const after = image.getBoundingClientRect();
  image.parentElement.scrollLeft += after.x + across * after.width - left;
  image.parentElement.scrollTop += after.y + down * after.height - top;
  say(byId("zoom-value"), `${Math.round(100 * currentZoom())} %`);
}

function currentZoom() {
  const image = byId("large-picture");
  return image.clientWidth / (image.naturalWidth || 1);
}

const ZOOMS = new Map([
  ["in", () => currentZoom() * 1.5],
  ["out", () => currentZoom() / 1.5],
  ["whole", () => 1],
  ["fit", () => null],
]);

function listenToEnlarging() {
  const image = byId("large-picture");
  byId("enlarge").addEventListener("click", () => {
    image.src = byId("preview").src;
    byId("large").showModal();
  });
  image.addEventListener("load", () => zoomPicture(chosen.zoom));
  window.addEventListener("resize", () => byId("large").open && zoomPicture(chosen.zoom));
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zoomPicture(ZOOMS.get(button.dataset.zoom)()));
  }
  image.parentElement.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      zoomPicture(currentZoom() * (event.deltaY < 0 ? 1.25 : 0.8), event.clientX, event.clientY);
    },
    { passive: false },
  );
  // A mouse moves the picture; a finger does so by itself.
  image.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse" || event.buttons !== 1) return;
    image.parentElement.scrollBy(-event.movementX, -event.movementY);
  });
  image.addEventListener("dragstart", (event) => event.preventDefault());
}

function listenToPreview() {
  listenToEnlarging();
  byId("history").addEventListener("input", () => choosePreview(Number(byId("history").value)));
  for (const id of ["pixels", "sheet"]) byId(id).addEventListener("change", showAgain);
  for (const id of ["mask", "other"]) {
    byId(id).addEventListener("change", () => {
      byId("sheet").checked = false;
      showAgain();
    });
  }
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => choosePreview(Number(byId("history").value) + Number(button.dataset.step)));
  }
  byId("preview").addEventListener("error", () =>
    say(byId("preview-problem"), "This preview cannot be shown: its file is damaged, or has been removed."),
  );
}
