// Pairs in three linked planes: what the page carries is unpacked when it is looked at, and drawn on plain canvases.
"use strict";
(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const facts = JSON.parse(document.getElementById("viewer-facts").textContent);
  const byId = (id) => document.getElementById(id);

  // Axes run to the right, the front and the top: u to the right of the picture, v upwards, w through it.
  const PLANES = {
    coronal: { u: 0, v: 2, w: 1, sides: ["L", "R", "I", "S"] },
    sagittal: { u: 1, v: 2, w: 0, sides: ["P", "A", "I", "S"] },
    axial: { u: 0, v: 1, w: 2, sides: ["L", "R", "P", "A"] },
  };
  const AXES = "xyz";
  const FIXED_OUTLINE = "#56b4e9";
  const WARPED_OUTLINE = "#e69f00";
  const STEPS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
  const KEPT = 24; // unpacked volumes: those of a pair and of some methods

  const state = {
    pair: null, method: null, volumes: {}, cursor: [0, 0, 0], blend: 1, overlay: "none", opacity: 0.6, smooth: false,
  };
  let request = 0; // which load is the last: a slower earlier one must not overwrite it
  let scheduled = false;

  const rgb = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  const structureColours = facts.structureColours.map(rgb);
  const jacobianColours = facts.jacobian.colours.map(rgb);
  const minus = (text) => String(text).replace("-", "\u2212");

  // ---- unpacking ----

  const unpacked = new Map();

  async function unpack(name) {
    const characters = atob(byId(name).textContent);
    const packed = new Uint8Array(characters.length);
    for (let i = 0; i < packed.length; i += 1) packed[i] = characters.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function volume(name) {
    const promise = unpacked.get(name) ?? unpack(name);
    unpacked.delete(name); // the last used stand last
    unpacked.set(name, promise);
    while (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
    return promise;
  }

  async function load() {
    const mine = (request += 1);
    root.dataset.state = "loading";
    const names = { ...state.pair.volumes, ...(state.method?.volumes ?? {}) };
    try {
      const arrays = await Promise.all(Object.values(names).map(volume));
      if (mine !== request) return;
      state.volumes = Object.fromEntries(Object.keys(names).map((key, i) => [key, arrays[i]]));
      tell(absence());
      draw();
      root.dataset.state = "ready";
    } catch (error) {
      if (mine !== request) return;
      root.dataset.state = "failed";
      tell(`The volumes cannot be unpacked (${error.message}). A current browser is needed.`);
    }
  }

  function absence() {
    if (!state.method) return "No method was run on this pair.";
    const reasons = {
      failed: `${state.method.name} failed on this pair: there is no warped image.`,
      missing: `No example of ${state.method.name} was kept of this pair.`,
    };
    return reasons[state.method.state] ?? "";
  }

  function tell(text) {
    byId("viewer-message").textContent = text;
    byId("viewer-message").hidden = !text;
  }

  // ---- pictures ----

  function stridesOf(shape) {
    return [1, shape[0], shape[0] * shape[1]];
  }

  // Calls paint(voxel, pixel) for every pixel of a plane; the first row of pixels is the top.
  function eachPixel(plane, paint) {
    const { shape } = state.pair;
    const strides = stridesOf(shape);
    const origin = state.cursor[plane.w] * strides[plane.w];
    let pixel = 0;
    for (let v = shape[plane.v] - 1; v >= 0; v -= 1) {
      let voxel = origin + v * strides[plane.v];
      for (let u = 0; u < shape[plane.u]; u += 1) {
        paint(voxel, pixel);
        voxel += strides[plane.u];
        pixel += 4;
      }
    }
  }

  // The two images that the slider stands between, and the weight of the second.
  function blended() {
    const { moving, warped, fixed } = state.volumes;
    if (!warped) return [moving, fixed, state.blend / 2];
    return state.blend <= 1 ? [moving, warped, state.blend] : [warped, fixed, state.blend - 1];
  }

  function greyPicture(plane, data) {
    const [first, second, weight] = blended();
    eachPixel(plane, (voxel, pixel) => {
      const grey = Math.round(first[voxel] * (1 - weight) + second[voxel] * weight);
      data[pixel] = data[pixel + 1] = data[pixel + 2] = grey;
      data[pixel + 3] = 255;
    });
  }

  // Returns false where there is nothing to lay over. Folds are opaque: they must not be overlooked.
  function overlayPicture(plane, data) {
    const codes = state.volumes[state.overlay];
    if (!codes) return false;
    const alpha = Math.round(255 * state.opacity);
    const jacobian = state.overlay === "jacobian";
    const colours = jacobian ? jacobianColours : structureColours;
    const empty = jacobian ? facts.jacobian.outside : 0;
    eachPixel(plane, (voxel, pixel) => {
      const code = codes[voxel];
      const colour = colours[code];
      data[pixel] = colour[0];
      data[pixel + 1] = colour[1];
      data[pixel + 2] = colour[2];
      data[pixel + 3] = code === empty ? 0 : jacobian && code === 0 ? 255 : alpha;
    });
    return true;
  }

  // Lines along the edges of voxels between which the structure changes.
  function outlinePath(plane, codes, width, height) {
    const { shape } = state.pair;
    const strides = stridesOf(shape);
    const [columns, rows] = [shape[plane.u], shape[plane.v]];
    const origin = state.cursor[plane.w] * strides[plane.w];
    const at = (u, v) => codes[origin + u * strides[plane.u] + v * strides[plane.v]];
    const [x, y] = [(u) => (u * width) / columns, (v) => height - (v * height) / rows];
    const path = new Path2D();
    for (let v = 0; v < rows; v += 1) {
      for (let u = 0; u < columns; u += 1) {
        if (u + 1 < columns && at(u, v) !== at(u + 1, v)) {
          path.moveTo(x(u + 1), y(v));
          path.lineTo(x(u + 1), y(v + 1));
        }
        if (v + 1 < rows && at(u, v) !== at(u, v + 1)) {
          path.moveTo(x(u), y(v + 1));
          path.lineTo(x(u + 1), y(v + 1));
        }
      }
    }
    return path;
  }

  const small = document.createElement("canvas");

  function layPicture(context, plane, fill, smooth) {
    const { shape } = state.pair;
    small.width = shape[plane.u];
    small.height = shape[plane.v];
    const picture = new ImageData(small.width, small.height);
    if (fill(plane, picture.data) === false) return;
    small.getContext("2d").putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
  }

  // On a layer of their own: where both run along one edge, the thin one lies on the thick one.
  function layOutlines(context, plane, ratio) {
    const layer = document.createElement("canvas");
    [layer.width, layer.height] = [context.canvas.width, context.canvas.height];
    const lines = layer.getContext("2d");
    for (const [key, colour, line] of [["fixedLabels", FIXED_OUTLINE, 2.8], ["warpedLabels", WARPED_OUTLINE, 1.2]]) {
      if (!state.volumes[key]) continue;
      lines.strokeStyle = colour;
      lines.lineWidth = line * ratio;
      lines.stroke(outlinePath(plane, state.volumes[key], layer.width, layer.height));
    }
    context.globalAlpha = state.opacity;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
  }

  function drawPlane(name) {
    const plane = PLANES[name];
    const canvas = byId(`viewer-${name}`);
    const context = canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    layPicture(context, plane, greyPicture, state.smooth);
    if (state.overlay === "outlines") {
      layOutlines(context, plane, ratio);
    } else if (state.overlay !== "none") {
      layPicture(context, plane, overlayPicture, false);
    }
    drawCross(context, plane, ratio);
    drawSides(context, plane, ratio);
    describe(name, plane, canvas);
  }

  // A gap in the middle keeps the place itself in sight.
  function drawCross(context, plane, ratio) {
    const { shape } = state.pair;
    const { width, height } = context.canvas;
    const x = ((state.cursor[plane.u] + 0.5) / shape[plane.u]) * width;
    const y = height - ((state.cursor[plane.v] + 0.5) / shape[plane.v]) * height;
    const gap = 7 * ratio;
    const path = new Path2D();
    for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]]) {
      path.moveTo(x0, y0);
      path.lineTo(x1, y1);
    }
    for (const [colour, line] of [["rgb(0 0 0 / .5)", 2], ["rgb(255 255 255 / .8)", 0.8]]) {
      context.strokeStyle = colour;
      context.lineWidth = line * ratio;
      context.stroke(path);
    }
  }

  function drawSides(context, plane, ratio) {
    const { width, height } = context.canvas;
    const size = 12 * ratio;
    const places = [[size * 0.8, height / 2], [width - size * 0.8, height / 2], [width / 2, height - size * 0.8], [width / 2, size * 0.8]];
    context.font = `600 ${size}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3 * ratio;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    plane.sides.forEach((side, i) => {
      context.strokeText(side, ...places[i]);
      context.fillText(side, ...places[i]);
    });
  }

  // ---- words ----

  function millimetres(voxel) {
    return state.pair.affine.map((line) => line[3] + voxel.reduce((sum, value, i) => sum + line[i] * value, 0));
  }

  function describe(name, plane, canvas) {
    const place = minus(millimetres(state.cursor)[plane.w].toFixed(1));
    byId(`viewer-${name}-place`).textContent = `${name}, ${AXES[plane.w]} = ${place} mm`;
    canvas.setAttribute("aria-valuemax", state.pair.shape[plane.w] - 1);
    canvas.setAttribute("aria-valuenow", state.cursor[plane.w]);
    canvas.setAttribute("aria-valuetext", `${AXES[plane.w]} ${place} millimetres`);
  }

  function readOut() {
    const strides = stridesOf(state.pair.shape);
    const voxel = state.cursor.reduce((sum, value, i) => sum + value * strides[i], 0);
    const [low, high] = state.pair.grey;
    for (const name of ["moving", "warped", "fixed"]) {
      const grey = state.volumes[name]?.[voxel];
      const code = state.volumes[`${name}Labels`]?.[voxel];
      byId(`readout-${name}`).textContent = grey === undefined ? "" : minus((low + (grey / 255) * (high - low)).toPrecision(3));
      byId(`readout-${name}-label`).textContent = code ? state.pair.structures[code] ?? "another structure" : code === 0 ? "–" : "";
    }
    byId("readout-position").textContent = millimetres(state.cursor)
      .map((value, i) => `${AXES[i]} ${minus(value.toFixed(1))}`)
      .join(", ") + " mm";
    byId("readout-jacobian").textContent = jacobianText(state.volumes.jacobian?.[voxel]);
    const dice = state.method?.dice;
    byId("readout-dice").textContent = dice === undefined || dice === null ? "" : dice.toFixed(3);
  }

  function jacobianText(code) {
    const { steps, highest, outside } = facts.jacobian;
    if (code === undefined) return "";
    if (code === outside) return "outside the brain";
    if (code === 0) return "≤ 0, folded";
    return `${code === highest ? "≥ " : ""}${(code / steps).toFixed(2)}`;
  }

  function element(tag, className, text = "") {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  }

  function legend() {
    const parts = [];
    const marked = (className, colour, text) => {
      const line = element("div", "");
      const mark = element("span", className);
      mark.style.background = colour;
      line.append(mark, text);
      return line;
    };
    if (state.overlay === "outlines") {
      parts.push(marked("line", FIXED_OUTLINE, "fixed scan"), marked("line", WARPED_OUTLINE, "warped"));
    } else if (state.overlay === "jacobian") {
      const scale = element("span", "scale");
      const colours = facts.jacobian.colours.slice(1, 2 * facts.jacobian.steps + 1).filter((_, i) => i % 10 === 0);
      scale.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
      const ends = element("span", "scale-ends");
      ends.append(element("span", "", "0"), element("span", "", "1"), element("span", "", "2"));
      parts.push(scale, ends, marked("square", facts.jacobian.colours[0], "folded: |J| ≤ 0"));
    } else if (state.overlay !== "none") {
      parts.push(element("div", "", "A colour a structure; the place's structures are named below."));
    }
    byId("viewer-legend").replaceChildren(...parts);
  }

  // ---- drawing ----

  // The planes share one scale, so that they fit together: as wide as there is room, and not higher than the window.
  function fit() {
    const millimetre = state.pair.shape.map((size, i) => size * state.pair.spacing[i]);
    const room = root.clientWidth - 8;
    const tallest = Math.max(420, innerHeight - 270);
    const scale = Math.min(room / (millimetre[0] + millimetre[1]), tallest / (millimetre[1] + millimetre[2]));
    for (const [name, plane] of Object.entries(PLANES)) {
      const canvas = byId(`viewer-${name}`);
      const [width, height] = [millimetre[plane.u] * scale, millimetre[plane.v] * scale];
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      const ratio = devicePixelRatio || 1;
      const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (canvas.width !== wide) canvas.width = wide;
      if (canvas.height !== high) canvas.height = high;
    }
  }

  function draw() {
    fit();
    for (const name of Object.keys(PLANES)) drawPlane(name);
    readOut();
    root.dataset.drawn = Number(root.dataset.drawn ?? 0) + 1;
  }

  function redraw() {
    if (scheduled || !state.volumes.moving) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      draw();
    });
  }

  // ---- choices ----

  function moveTo(axis, place) {
    state.cursor[axis] = Math.min(Math.max(place, 0), state.pair.shape[axis] - 1);
    redraw();
  }

  function choosePair(number) {
    const before = state.pair;
    state.pair = facts.pairs[number];
    const same = before && before.shape.join() === state.pair.shape.join();
    if (!same) state.cursor = state.pair.shape.map((size) => Math.floor(size / 2));
    const wanted = state.method?.method ?? root.dataset.reference;
    const options = state.pair.methods.map((entry, i) => {
      const option = element("option", "", entry.state === "ok" ? entry.name : `${entry.name} (${entry.state})`);
      option.value = i;
      return option;
    });
    byId("viewer-method").replaceChildren(...options);
    const place = state.pair.methods.findIndex((entry) => entry.method === wanted);
    chooseMethod(Math.max(place, 0));
  }

  function chooseMethod(number) {
    state.method = state.pair.methods[number];
    byId("viewer-method").value = number;
    return load();
  }

  function chooseBlend(value) {
    state.blend = value;
    const slider = byId("viewer-blend");
    slider.value = value;
    const names = ["moving", "warped", "fixed"];
    const [from, share] = [Math.min(Math.floor(value), 1), Math.round(100 * (value - Math.min(Math.floor(value), 1)))];
    const text = share === 0 ? names[from] : share === 100 ? names[from + 1] : `${100 - share} % ${names[from]}, ${share} % ${names[from + 1]}`;
    slider.setAttribute("aria-valuetext", text);
    for (const button of root.querySelectorAll("[data-blend]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.blend) === value));
    }
    redraw();
  }

  function listen() {
    byId("viewer-pair").addEventListener("change", (event) => choosePair(Number(event.target.value)));
    byId("viewer-method").addEventListener("change", (event) => chooseMethod(Number(event.target.value)));
    byId("viewer-overlay").addEventListener("change", (event) => {
      state.overlay = event.target.value;
      legend();
      redraw();
    });
    byId("viewer-opacity").addEventListener("input", (event) => {
      state.opacity = Number(event.target.value);
      redraw();
    });
    byId("viewer-smooth").addEventListener("change", (event) => {
      state.smooth = event.target.checked;
      redraw();
    });
    byId("viewer-blend").addEventListener("input", (event) => chooseBlend(Number(event.target.value)));
    for (const button of root.querySelectorAll("[data-blend]")) {
      button.addEventListener("click", () => chooseBlend(Number(button.dataset.blend)));
    }
    for (const name of Object.keys(PLANES)) listenTo(byId(`viewer-${name}`), PLANES[name]);
    new ResizeObserver(redraw).observe(root);
  }

  function listenTo(canvas, plane) {
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const { shape } = state.pair;
      moveTo(plane.u, Math.floor(((event.clientX - box.left) / box.width) * shape[plane.u]));
      moveTo(plane.v, Math.floor((1 - (event.clientY - box.top) / box.height) * shape[plane.v]));
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      point(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) point(event);
    });
    let turned = 0; // of the wheel: a trackpad tells many small turns
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (event.ctrlKey || !event.deltaY) return; // that is zooming
        event.preventDefault();
        turned += event.deltaMode ? event.deltaY * 40 : event.deltaY;
        const slices = Math.trunc(turned / 40) || 0;
        if (!slices) return;
        turned -= slices * 40;
        moveTo(plane.w, state.cursor[plane.w] - Math.sign(slices) * Math.min(Math.abs(slices), 3));
      },
      { passive: false },
    );
    canvas.addEventListener("keydown", (event) => {
      const last = state.pair.shape[plane.w] - 1;
      const place = { Home: 0, End: last }[event.key] ?? state.cursor[plane.w] + STEPS[event.key];
      if (Number.isNaN(place)) return;
      event.preventDefault();
      moveTo(plane.w, place);
    });
  }

  function start() {
    if (typeof DecompressionStream === "undefined") {
      root.dataset.state = "failed";
      tell("This browser cannot unpack the volumes (no DecompressionStream): a current one is needed.");
      return;
    }
    listen();
    legend();
    chooseBlend(1);
    choosePair(0);
  }

  // Nothing is unpacked before the viewer comes near; by then all volumes are parsed.
  const near = new IntersectionObserver(
    (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      near.disconnect();
      if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
      else start();
    },
    { rootMargin: "300px" },
  );
  near.observe(root);
})();
