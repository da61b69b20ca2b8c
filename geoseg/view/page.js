// The page of an output: reads scenes.json, lists the scenes, and shows the one that is chosen on a map in its own CRS.
// Whatever comes from metadata becomes text (textContent) or an encoded part of a path, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const PAGE = 200; // scenes listed at once
const KEPT = 4; // scenes of one CRS that stay on the map
const TILE = 256;
const STATUSES = ["published", "held", "refused", "failed", "unfinished", "removed"];
const LAYERS = { buildings: "polygons", roads: "lines" };
const UNITS = { _m2: "m²", _m: "m", _km2: "km²", _km: "km" };
const numbers = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const pixels = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en");
let scenes = [];
let statuses = new Set();
let listed = PAGE;
let chosen = null; // the scene whose facts are shown
let shown = []; // scenes on the map, all of one CRS, the chosen one last
let asked = 0; // counts choices, so that a late answer to an earlier one is dropped

const path = (id, ...rest) => ["scenes", encodeURIComponent(id), ...rest.map(encodeURIComponent)].join("/");

async function ask(url) {
  const answer = await fetch(url).catch(() => {
    throw new Error("geoseg view does not answer any more; start it again");
  });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.sentence ?? `the answer was ${answer.status}`);
  return told;
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function note(sentence) {
  $("note").textContent = sentence;
}

// ---- the list -----------------------------------------------------------------------------------------------------

function found() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return scenes.filter((scene) => {
    if (statuses.size && !statuses.has(scene.status)) return false;
    const text = `${scene.id} ${scene.status} ${scene.sentence}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

function drawStatuses() {
  const counts = new Map();
  for (const scene of scenes) counts.set(scene.status, (counts.get(scene.status) ?? 0) + 1);
  $("statuses").replaceChildren(
    ...STATUSES.filter((status) => counts.has(status)).map((status) => {
      const button = make("button", { type: "button", className: status });
      button.append(make("span", { className: `tag ${status}`, textContent: status }), ` ${whole.format(counts.get(status))}`);
      button.dataset.status = status;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        if (!statuses.delete(status)) statuses.add(status);
        button.setAttribute("aria-pressed", String(statuses.has(status)));
        listed = PAGE;
        drawList();
      });
      return button;
    }),
  );
}

function drawList() {
  const matching = found();
  const focused = document.activeElement?.dataset?.id;
  $("found").textContent =
    matching.length === scenes.length
      ? `${whole.format(scenes.length)} ${scenes.length === 1 ? "scene" : "scenes"}`
      : `${whole.format(matching.length)} of ${whole.format(scenes.length)} scenes`;
  $("list").replaceChildren(...matching.slice(0, listed).map(entry));
  const left = matching.length - listed;
  $("more").hidden = left <= 0;
  $("more").textContent = `Show ${whole.format(Math.min(PAGE, left))} more`;
  markChosen();
  if (focused !== undefined) [...$("list").querySelectorAll("button")].find((one) => one.dataset.id === focused)?.focus();
}

function entry(scene) {
  const button = make("button", { type: "button", tabIndex: -1, title: scene.id });
  button.dataset.id = scene.id;
  const picture = scene.thumbnail
    ? make("img", { className: "picture", alt: "", loading: "lazy", src: path(scene.id, "thumbnail") })
    : make("span", { className: "picture" });
  const told = make("span", {}, make("span", { className: "name", textContent: scene.id }));
  told.append(make("span", { className: `tag ${scene.status}`, textContent: scene.status }));
  button.append(picture, told);
  button.addEventListener("click", () => choose(scene.id, { enter: true }));
  return make("li", {}, button);
}

function markChosen() {
  const buttons = [...$("list").querySelectorAll("button")];
  for (const one of buttons) {
    const isChosen = one.dataset.id === chosen?.id;
    one.tabIndex = isChosen ? 0 : -1;
    if (isChosen) one.setAttribute("aria-current", "true");
    else one.removeAttribute("aria-current");
  }
  if (buttons.length && !buttons.some((one) => one.tabIndex === 0)) buttons[0].tabIndex = 0;
}

$("list").addEventListener("keydown", (event) => {
  const buttons = [...$("list").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1, PageDown: at + 8, PageUp: at - 8 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  const next = buttons[Math.max(0, Math.min(buttons.length - 1, to))];
  for (const one of buttons) one.tabIndex = one === next ? 0 : -1;
  next.focus();
});
$("search").addEventListener("input", () => {
  listed = PAGE;
  drawList();
});
$("search").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown") return;
  event.preventDefault();
  $("list").querySelector("button")?.focus();
});
$("more").addEventListener("click", () => {
  listed += PAGE;
  drawList();
});

function showList(open) {
  document.body.classList.toggle("listing", open);
  $("show-scenes").setAttribute("aria-expanded", String(open));
  $("show-scenes").textContent = open ? "Map" : "Scenes";
}
$("show-scenes").addEventListener("click", () => {
  const open = !document.body.classList.contains("listing");
  showList(open);
  if (open) $("search").focus();
});

// ---- the map ------------------------------------------------------------------------------------------------------

const map = new ol.Map({
  target: "map",
  layers: [],
  controls: [new ol.control.Zoom(), new ol.control.ScaleLine({ units: "metric", minWidth: 72 }), fitControl()],
});

function fitControl() {
  const button = make("button", { type: "button", title: "Show all of the scene", textContent: "⤢" });
  button.setAttribute("aria-label", "Show all of the scene");
  button.addEventListener("click", () => fit());
  return new ol.control.Control({ element: make("div", { className: "ol-fit ol-unselectable ol-control" }, button) });
}

function projectionOf(grid) {
  // Metres come from the ellipsoid at the scene's middle; a projection of units "m" takes what the function gives as it is.
  return new ol.proj.Projection({
    code: `${grid.crs} at ${grid.m_per_unit}`,
    units: "m",
    getPointResolution: (resolution) => resolution * grid.m_per_unit,
  });
}

function tileSource(id, what, pyramid, query = "") {
  const [left, , , top] = pyramid.extent;
  return new ol.source.TileImage({
    projection: map.getView().getProjection(),
    tileGrid: new ol.tilegrid.TileGrid({ extent: pyramid.extent, origin: [left, top], resolutions: pyramid.resolutions, tileSize: TILE }),
    tileUrlFunction: ([level, col, row]) => `${path(id, what, level, col, row)}${query}`,
    interpolate: what === "image",
    transition: 0,
  });
}

const classesOn = () => new Set([...$("legend").querySelectorAll("input:checked")].map((one) => Number(one.value)));

function drawnMask(scene, layer) {
  const query = () => `?show=${[...classesOn()].join(",")}`;
  const draw = () => layer.setSource(tileSource(scene.id, "mask", scene.mask_tiles, query()));
  draw();
  return draw;
}

// The browser reads the mask's blocks and gives codes their colours; codes are never mixed. What it cannot read (rows that do not
// run from west to east, a file that somebody wrote again in another way) is drawn by geoseg view.
async function fillMask(scene, layer) {
  if (!scene.grid.north_up) return drawnMask(scene, layer);
  let cog;
  try {
    cog = await Cog.open(path(scene.id, "files", scene.files.mask));
  } catch {
    return drawnMask(scene, layer);
  }
  const { extent, width, height } = scene.grid;
  const [across, down] = [(extent[2] - extent[0]) / width, (extent[3] - extent[1]) / height];
  const last = cog.levels.length - 1;
  const coarseToFine = [...cog.levels].reverse();
  const source = new ol.source.ImageTile({
    projection: map.getView().getProjection(),
    tileGrid: new ol.tilegrid.TileGrid({
      extent,
      origin: [extent[0], extent[3]],
      resolutions: coarseToFine.map((_, z) => across * 2 ** (last - z)),
      tileSizes: coarseToFine.map(({ side }) => [side, (side * down) / across]),
    }),
    loader: async (z, col, row, { signal }) => {
      const { side } = cog.levels[last - z];
      return paint(await cog.block(last - z, col, row, signal), side, scene.classes);
    },
    interpolate: false,
    transition: 0,
    wrapX: false,
  });
  layer.setSource(source);
  return () => source.setKey([...classesOn()].join(","));
}

// A mask that is held back is not published; its small picture is stretched over the scene.
function heldMask(scene, layer) {
  const projection = map.getView().getProjection();
  return () => {
    const url = `${path(scene.id, "held")}?show=${[...classesOn()].join(",")}`;
    layer.setSource(new ol.source.ImageStatic({ url, imageExtent: scene.grid.extent, projection, interpolate: false }));
  };
}

function paint(codes, side, classes) {
  const canvas = make("canvas", { width: side, height: side });
  if (!codes) return canvas;
  const on = classesOn();
  const table = new Uint32Array(256);
  for (const { value, color } of classes) {
    if (on.has(value)) new Uint8Array(table.buffer, value * 4, 4).set([...color, 255]);
  }
  const image = new ImageData(side, side);
  const colors = new Uint32Array(image.data.buffer);
  for (let at = 0; at < codes.length; at += 1) colors[at] = table[codes[at]];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function vectorLayer(scene, name) {
  const color = classColor(scene, name);
  const style = (feature) => {
    const isPicked = feature === picked?.feature;
    const width = LAYERS[name] === "lines" ? 2.5 : 1.8;
    return [
      new ol.style.Style({ stroke: new ol.style.Stroke({ color: isPicked ? "#000" : "rgba(0,0,0,.65)", width: width + (isPicked ? 5 : 1.8) }) }),
      new ol.style.Style({
        stroke: new ol.style.Stroke({ color: isPicked ? "#fff" : color, width: width + (isPicked ? 1 : 0) }),
        fill: new ol.style.Fill({ color: isPicked ? "rgba(255,255,255,.35)" : "rgba(0,0,0,.01)" }),
      }),
    ];
  };
  const source = new ol.source.Vector();
  return new ol.layer.Vector({ className: "vector-layer", zIndex: LAYERS[name] === "lines" ? 4 : 3, source, style });
}

function outlineLayer(grid) {
  const feature = new ol.Feature(new ol.geom.Polygon([[...grid.corners, grid.corners[0]]]));
  const line = (color, lineDash) => new ol.style.Style({ stroke: new ol.style.Stroke({ color, width: 1.5, lineDash }) });
  const source = new ol.source.Vector({ features: [feature] });
  return new ol.layer.Vector({ className: "outline-layer", zIndex: 5, source, style: [line("#fff"), line("#000", [6, 6])] });
}

function classColor(scene, name) {
  const stem = name.replace(/s$/, "");
  const one = scene.classes.find((told) => told.name === stem || told.name === name);
  return one ? `rgb(${one.color.join(",")})` : "rgb(0,170,255)";
}

// All of the chosen scene, in what the panels leave free of the map.
function fit() {
  const extent = chosen?.grid?.extent;
  if (!extent) return;
  const [width, height] = map.getSize();
  const top = $("about").offsetTop + $("about").offsetHeight + 12;
  const [right, left, bottom] = width > 700 ? [290, 60, 50] : [12, 12, 66];
  const isRoomy = width - right - left > 120 && height - top - bottom > 120;
  map.getView().fit(extent, { padding: isRoomy ? [top, right, bottom, left] : [10, 10, 10, 10] });
}

function useView(grid) {
  const same = shown.length && shown[0].grid.crs === grid.crs && Math.abs(Math.log(shown[0].grid.m_per_unit / grid.m_per_unit)) < 0.02;
  if (same) return;
  for (const one of shown.splice(0)) drop(one);
  const [xmin, ymin, xmax, ymax] = grid.extent;
  const pixel = grid.pixel_m / grid.m_per_unit;
  const all = Math.max(xmax - xmin, ymax - ymin);
  map.setView(
    new ol.View({
      projection: projectionOf(grid),
      center: [(xmin + xmax) / 2, (ymin + ymax) / 2],
      resolution: all / 400,
      maxResolution: all / 20,
      minResolution: pixel / 16,
      constrainResolution: false,
      showFullExtent: true,
      enableRotation: false,
    }),
  );
}

function drop(scene) {
  for (const layer of scene.onMap ?? []) {
    map.removeLayer(layer);
    layer.dispose();
  }
  scene.onMap = [];
}

async function choose(id, { enter = false } = {}) {
  const turn = ++asked;
  note("Reading the scene …");
  closeCard();
  let scene;
  try {
    scene = await ask(path(id, "scene.json"));
  } catch (error) {
    if (turn === asked) note(error.message);
    return;
  }
  if (turn !== asked) return;
  history.replaceState(null, "", `#${encodeURIComponent(id)}`);
  for (const one of shown.filter((other) => other.id === id)) drop(one);
  shown = shown.filter((other) => other.id !== id);
  for (const one of scene.grid ? [] : shown.splice(0)) drop(one);
  for (const one of shown) for (const layer of Object.values(one.vectors ?? {})) layer.getSource().clear(true);
  chosen = scene;
  scene.onMap = [];
  markChosen();
  tell(scene);
  if (enter && document.body.classList.contains("listing")) {
    showList(false);
    $("title").focus();
  }
  drawLegend(scene);
  if (scene.grid) {
    useView(scene.grid);
    shown.push(scene);
    add(scene, outlineLayer(scene.grid));
    const mask = new ol.layer.Tile({ className: "mask-layer", zIndex: 2 });
    add(scene, mask);
    fillMask(scene, mask).then((restyle) => (scene.restyle = restyle));
    scene.vectors = Object.fromEntries(scene.layers.map((name) => [name, vectorLayer(scene, name)]));
    for (const layer of Object.values(scene.vectors)) add(scene, layer);
    fit();
  }
  for (const one of shown.splice(0, Math.max(0, shown.length - KEPT))) drop(one);
  applyLayers();
  note(scene.grid ? "" : "Looking for the image …");
  await addImage(scene, turn);
  if (turn === asked) loadFeatures();
}

function add(scene, layer) {
  scene.onMap.push(layer);
  map.addLayer(layer);
}

async function addImage(scene, turn) {
  let image;
  try {
    image = await ask(path(scene.id, "image.json"));
  } catch (error) {
    image = { sentence: error.message };
  }
  if (turn !== asked && !shown.includes(scene)) return;
  scene.image = image;
  if (image.tiles) {
    if (!scene.grid) {
      scene.grid = image.grid;
      useView(scene.grid);
      shown.push(scene);
      add(scene, outlineLayer(scene.grid));
      fit();
    }
    if (image.grid.crs === scene.grid.crs) {
      const layer = new ol.layer.Tile({
        className: "image-layer",
        zIndex: 1,
        source: tileSource(scene.id, "image", image.tiles),
        ...(image.max_resolution ? { maxResolution: image.max_resolution } : {}),
      });
      scene.imageLayer = layer;
      add(scene, layer);
      if (!scene.mask && scene.thumbnail) {
        const held = new ol.layer.Image({ className: "held-layer", zIndex: 2 });
        scene.restyle = heldMask(scene, held);
        scene.restyle();
        add(scene, held);
      }
    } else {
      scene.image = { sentence: `The image is in another CRS (${image.grid.crs}) than the mask (${scene.grid.crs}).` };
    }
  }
  applyLayers();
  if (scene !== chosen) return;
  $("image-on").disabled = !scene.image.tiles;
  tellImage();
  note(scene.grid ? "" : image.sentence);
}

function tellImage() {
  const image = chosen?.image;
  const isTooFar = image?.max_resolution && map.getView().getResolution() > image.max_resolution;
  const sentence = isTooFar ? "Zoom in to see the image: the file has no overviews." : image?.sentence ?? "";
  $("image-told").textContent = sentence;
  $("image-told").hidden = !sentence;
}

function applyLayers() {
  const opacity = Number($("opacity").value) / 100;
  for (const scene of shown) {
    for (const layer of scene.onMap) {
      const kind = layer.getClassName();
      if (kind === "image-layer") layer.setVisible($("image-on").checked);
      if (kind === "mask-layer" || kind === "held-layer") {
        layer.setVisible($("mask-on").checked);
        layer.setOpacity(opacity);
      }
    }
    for (const [name, layer] of Object.entries(scene.vectors ?? {})) layer.setVisible($(`${name}-on`).checked);
  }
  $("opacity-told").textContent = `${$("opacity").value} %`;
}

// ---- what is told of a scene --------------------------------------------------------------------------------------

function tell(scene) {
  $("about").hidden = false;
  $("title").textContent = scene.id;
  const facts = [make("span", { className: `tag ${scene.status}`, textContent: scene.status })];
  if (scene.grid) {
    const { width, height, pixel_m, crs } = scene.grid;
    const told = [`${whole.format(width)} × ${whole.format(height)} px of ${pixels.format(pixel_m)} m`, crs];
    if (scene.moment) told.unshift(scene.moment.slice(0, 10));
    if (scene.bundle) told.push(scene.bundle);
    facts.push(` · ${told.join(" · ")}`);
  }
  $("facts").replaceChildren(...facts);
  const turned = scene.grid && !scene.grid.north_up ? "Its rows do not run from west to east, so its mask is drawn by geoseg view." : "";
  $("sentence").textContent = [scene.sentence, turned].filter(Boolean).join(" ");
  $("layers").hidden = false;
  $("image-told").hidden = true;
  const hasMask = Boolean(scene.mask || scene.thumbnail);
  $("mask-rows").hidden = !hasMask;
  $("vector-rows").hidden = !(scene.layers ?? []).length;
  for (const name of Object.keys(LAYERS)) {
    const row = document.querySelector(`[data-layer="${name}"]`);
    row.hidden = !(scene.layers ?? []).includes(name);
    row.querySelector(".count").textContent = "";
    if (!row.hidden) row.querySelector(".key").style.setProperty("--key", classColor(scene, name));
  }
  const links = Object.entries(scene.files ?? {}).map(([key, name]) => make("a", { href: path(scene.id, "files", name), download: name, textContent: key.replaceAll("_", " ") }));
  $("links").replaceChildren(...(links.length ? ["Files: ", ...links] : []));
  swipeTo(swipe.at);
  document.title = `${scene.id} – geoseg view`;
}

function drawLegend(scene) {
  const classes = scene.classes ?? [];
  const off = new Set([...$("legend").querySelectorAll("input:not(:checked)")].map((one) => one.dataset.name));
  const known = new Set([...$("legend").querySelectorAll("input")].map((one) => one.dataset.name));
  const all = classes.reduce((sum, one) => sum + one.count, 0);
  $("legend").replaceChildren(
    ...classes.map((one) => {
      const box = make("input", { type: "checkbox", value: String(one.value) });
      box.dataset.name = one.name;
      box.checked = known.has(one.name) ? !off.has(one.name) : one.value !== 0; // background lies over the image
      box.addEventListener("change", () => shown.forEach((other) => other.restyle?.()));
      const swatch = make("span", { className: "swatch" });
      swatch.style.backgroundColor = `rgb(${one.color.join(",")})`;
      const share = make("span", { className: "share soft", textContent: all ? `${(100 * one.count / all).toFixed(1)} %` : "" });
      const row = make("label", { className: "row" }, box, swatch, make("span", { className: "name", textContent: one.name }), share);
      return make("li", {}, row);
    }),
  );
}

// ---- polygons and lines -------------------------------------------------------------------------------------------

let loading = false;
let isStale = false;

// One question at a time; what was moved in the meantime is asked when the answer is there.
async function loadFeatures() {
  isStale = true;
  if (loading) return;
  loading = true;
  while (isStale) {
    isStale = false;
    const scene = chosen;
    for (const [name, layer] of Object.entries(scene?.vectors ?? {})) {
      if ($(`${name}-on`).checked && map.getSize()) await loadLayer(scene, name, layer);
    }
  }
  loading = false;
}

async function loadLayer(scene, name, layer) {
  const view = map.getView();
  const box = ol.extent.buffer(view.calculateExtent(map.getSize()), view.getResolution() * 100);
  let sentence;
  try {
    const told = await ask(`${path(scene.id, "features", name)}?bbox=${box.join(",")}`);
    const features = new ol.format.GeoJSON().readFeatures(told);
    layer.getSource().clear(true);
    layer.getSource().addFeatures(features);
    sentence = told.too_many ? "zoom in to see them" : `${whole.format(features.length)} in view`;
    repick(layer, name);
  } catch (error) {
    sentence = error.message;
  }
  if (scene === chosen) document.querySelector(`[data-layer="${name}"] .count`).textContent = sentence;
}

let picked = null; // {feature, name, id}

function repick(layer, name) {
  if (picked?.name !== name) return;
  picked.feature = layer.getSource().getFeatures().find((one) => one.get("id") === picked.id) ?? null;
  layer.changed();
}

// The feature at a place of the map or within six pixels of it, the nearest one; inside a polygon is no distance.
function featureAt(place) {
  const reach = 6 * map.getView().getResolution();
  let best = null;
  for (const [name, layer] of Object.entries(chosen.vectors)) {
    if (!layer.getVisible()) continue;
    for (const feature of layer.getSource().getFeaturesInExtent(ol.extent.buffer([...place, ...place], reach))) {
      const geometry = feature.getGeometry();
      const [x, y] = geometry.intersectsCoordinate(place) ? place : geometry.getClosestPoint(place);
      const distance = Math.hypot(x - place[0], y - place[1]);
      if (distance <= reach && !(best?.distance <= distance)) best = { feature, name, distance };
    }
  }
  return best;
}

function pickAt(pixel) {
  if (!chosen?.vectors || (swipe.on && pixel[0] < (map.getSize()[0] * swipe.at) / 100)) return closeCard();
  const best = featureAt(map.getCoordinateFromPixel(pixel));
  if (!best) return closeCard();
  const { feature, name } = best;
  const { geometry, ...rows } = feature.getProperties();
  picked = { feature, name, id: rows.id };
  $("card-title").textContent = name === "roads" ? "Road" : "Building";
  const entries = Object.entries(rows).map(([key, value]) => attribute(key, value));
  $("card-rows").replaceChildren(...entries.flatMap(([key, value]) => [make("dt", { textContent: key }), make("dd", { textContent: value })]));
  $("card").hidden = false;
  for (const layer of Object.values(chosen.vectors)) layer.changed();
}

function attribute(key, value) {
  const suffix = Object.keys(UNITS).find((one) => key.endsWith(one));
  const label = (suffix ? key.slice(0, -suffix.length) : key).replaceAll("_", " ");
  if (value === null || value === undefined) return [label, "not known"];
  if (key === "class") return [label, chosen.classes.find((one) => one.value === value)?.name ?? String(value)];
  if (typeof value !== "number" || key === "id") return [label, String(value)];
  return [label, suffix ? `${numbers.format(value)} ${UNITS[suffix]}` : numbers.format(value)];
}

function closeCard() {
  $("card").hidden = true;
  if (!picked) return;
  picked = null;
  for (const layer of Object.values(chosen?.vectors ?? {})) layer.changed();
}
$("card-close").addEventListener("click", () => {
  closeCard();
  $("map").focus();
});

let waiting = 0;
map.on("loadstart", () => {
  waiting = setTimeout(() => note("Reading …"), 300);
  $("map").setAttribute("aria-busy", "true");
});
map.on("loadend", () => {
  clearTimeout(waiting);
  $("map").setAttribute("aria-busy", "false");
  if ($("note").textContent === "Reading …") note("");
});
map.on("singleclick", (event) => pickAt(event.pixel));
map.on("moveend", () => {
  tellImage();
  loadFeatures();
});
$("map").addEventListener("keydown", (event) => {
  if (event.target === $("map") && event.key === "Enter") pickAt(map.getSize().map((side) => side / 2));
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  closeCard();
  showList(false);
});

// ---- opacity, layers, swipe ---------------------------------------------------------------------------------------

const swipe = { on: false, at: 50 };

function swipeTo(percent) {
  swipe.at = Math.max(0, Math.min(100, percent));
  swipe.on = $("swipe-on").checked && !$("mask-rows").hidden;
  $("swipe").hidden = !swipe.on;
  $("swipe").style.left = `${swipe.at}%`;
  $("map").style.setProperty("--swipe", swipe.on ? `${swipe.at}%` : "0%");
  $("handle").setAttribute("aria-valuenow", String(Math.round(swipe.at)));
  $("handle").setAttribute("aria-valuetext", `${Math.round(swipe.at)} % image alone`);
}
$("swipe-on").addEventListener("change", () => swipeTo(swipe.at));
$("handle").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  swipeTo(swipe.at + step);
});
$("handle").addEventListener("pointerdown", (event) => {
  event.preventDefault();
  $("handle").focus();
  $("handle").setPointerCapture(event.pointerId);
});
$("handle").addEventListener("pointermove", (event) => {
  if (!$("handle").hasPointerCapture(event.pointerId)) return;
  const box = $("map").getBoundingClientRect();
  swipeTo((100 * (event.clientX - box.left)) / box.width);
});
for (const id of ["image-on", "mask-on", "opacity"]) $(id).addEventListener("input", applyLayers);
for (const name of Object.keys(LAYERS)) {
  $(`${name}-on`).addEventListener("change", () => {
    applyLayers();
    loadFeatures();
  });
}

// ---- begin --------------------------------------------------------------------------------------------------------

async function begin() {
  if (matchMedia("(max-width: 760px)").matches) $("layers").open = false;
  let told;
  try {
    told = await ask("scenes.json");
  } catch (error) {
    note(error.message);
    return;
  }
  scenes = told.scenes;
  $("out").textContent = told.out;
  $("out").title = told.out;
  $("remark").textContent = told.remark;
  $("remark").hidden = !told.remark;
  drawStatuses();
  drawList();
  let wanted = "";
  try {
    wanted = decodeURIComponent(location.hash.slice(1));
  } catch {
    wanted = "";
  }
  const first = scenes.find((one) => one.id === wanted) ?? scenes.find((one) => one.mask) ?? scenes[0];
  if (first) await choose(first.id);
}
begin();
