"use strict";
document.documentElement.classList.add("scripted");

// Side by side, or one over the other with a divider: the original left of it, the reconstruction right of it.
const wipeButton = document.getElementById("wipe");
function setView(view) {
  document.body.dataset.view = view;
  wipeButton.setAttribute("aria-pressed", String(view === "slider"));
  for (const choice of document.querySelectorAll("input[name=view]")) choice.checked = choice.value === view;
}
function setCut(pair, percent) {
  const cut = Math.min(100, Math.max(0, percent));
  const range = pair.querySelector("input[type=range]");
  range.value = cut;
  range.setAttribute("aria-valuetext", Math.round(cut) + " % original, " + Math.round(100 - cut) + " % reconstruction");
  pair.style.setProperty("--cut", cut + "%");
}
function makeWipe(pair) {
  const range = pair.querySelector("input[type=range]");
  const picture = pair.querySelector(".over");
  let from = null, moved = false;
  range.addEventListener("input", () => setCut(pair, Number(range.value)));
  picture.addEventListener("pointerdown", (event) => {
    moved = false;
    if (document.body.dataset.view === "slider" && event.button === 0) from = event.clientX;
  });
  picture.addEventListener("pointermove", (event) => {
    if (from === null || (!moved && Math.abs(event.clientX - from) < 4)) return;
    if (!moved) picture.setPointerCapture(event.pointerId);
    moved = true;
    const box = picture.getBoundingClientRect();
    setCut(pair, (100 * (event.clientX - box.left)) / box.width);
  });
  for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, () => { from = null; });
  // a drag is no press: it must not open the large view
  picture.addEventListener("click", (event) => { if (moved) event.stopImmediatePropagation(); moved = false; });
  picture.addEventListener("dragstart", (event) => event.preventDefault());
  setCut(pair, 50);
}
for (const choice of document.querySelectorAll("input[name=view]")) {
  choice.addEventListener("change", () => setView(choice.value));
}
document.querySelectorAll(".pair").forEach(makeWipe);

// The large view.
const viewer = document.getElementById("viewer");
const stage = document.getElementById("stage");
let group = [], at = 0;

function framed(image) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = image.dataset.role;
  figure.append(image.cloneNode(), caption);
  return figure;
}
function overlaid(images) {
  const pair = document.createElement("div"), over = document.createElement("div"), range = document.createElement("input");
  pair.className = "pair large";
  over.className = "over";
  over.append(...images.map((image) => image.cloneNode()));
  range.type = "range";
  range.setAttribute("aria-label", "Divider between original and reconstruction");
  const ends = document.createElement("div"), first = document.createElement("span"), last = document.createElement("span");
  ends.className = "ends";
  first.textContent = images[0].dataset.role;
  last.textContent = images[1].dataset.role;
  ends.append(first, range, last);
  pair.append(over, ends);
  pair.style.setProperty("--ratio", images[0].naturalWidth / images[0].naturalHeight);
  makeWipe(pair);
  return pair;
}
function show(index) {
  at = (index + group.length) % group.length;
  const button = group[at];
  const above = button.dataset.above ? [...document.querySelectorAll("#" + button.dataset.above + " img")] : [];
  const images = [...above, ...button.querySelectorAll("img")];
  const twofold = images.length === 2 && above.length === 0;
  wipeButton.hidden = !twofold;
  for (const id of ["previous", "next"]) document.getElementById(id).hidden = group.length < 2;
  document.getElementById("viewer-caption").textContent = button.dataset.caption;
  stage.className = above.length ? "stage rows" : "stage";
  stage.style.setProperty("--columns", String(above.length || 1));
  if (twofold && document.body.dataset.view === "slider") stage.replaceChildren(overlaid(images));
  else stage.replaceChildren(...images.map(framed));
}
for (const button of document.querySelectorAll("button.zoom")) {
  button.addEventListener("click", () => {
    group = [...document.querySelectorAll("button.zoom")].filter((other) => other.dataset.group === button.dataset.group);
    show(group.indexOf(button));
    viewer.showModal();
    document.getElementById(group.length < 2 ? "close" : "next").focus();
  });
}
wipeButton.addEventListener("click", () => {
  setView(document.body.dataset.view === "slider" ? "side" : "slider");
  show(at);
});
document.getElementById("previous").addEventListener("click", () => show(at - 1));
document.getElementById("next").addEventListener("click", () => show(at + 1));
document.getElementById("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", (event) => {
  if (event.target.type === "range") return;
  if (event.key === "ArrowLeft") show(at - 1);
  if (event.key === "ArrowRight") show(at + 1);
});

// Tables that a press on a heading sorts.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const opposite = { ascending: "descending", descending: "ascending" };
    const direction = opposite[head.getAttribute("aria-sort")] || head.dataset.first;
    const sign = direction === "ascending" ? 1 : -1;
    const numeric = head.classList.contains("n");
    const value = (row) => row.cells[column]?.dataset.value ?? "";  // a row may have one wide cell, with its error
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what was not measured stays last
      return sign * (numeric ? Number(x) - Number(y) || 0 : x.localeCompare(y));
    }));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
  }));
}

// A link into a part that is folded opens it.
function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.closest("details");
  if (!folded || folded.open) return;
  folded.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    getSelection().selectAllChildren(source);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected: press Ctrl+C";  // the browser does not let a file write to the clipboard
    }
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
