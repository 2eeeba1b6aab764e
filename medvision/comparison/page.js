"use strict";
const { pictures } = JSON.parse(document.getElementById("data").textContent);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const shown = (value, digits = 4) => (value === null || Number.isNaN(value) ? "-" : value.toFixed(digits));

// tables: a click on a heading sorts, another one turns the order; what has no value comes last
const keyOf = (cell, isNumber) => {
  const text = cell.textContent.trim();
  if (text === "-" || text === "") return null;
  if (!isNumber) return text;
  return text.startsWith("<") ? parseFloat(text.slice(1)) - 1e-9 : parseFloat(text);
};
const before = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
const byKey = (key, sign) => (one, other) => {
  const [a, b] = [key(one), key(other)];
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * before(a, b);
};
for (const heading of document.querySelectorAll(".sortable th")) {
  heading.firstElementChild.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const descending = heading.ariaSort === "ascending";
    for (const other of heading.parentElement.children) other.ariaSort = "none";
    heading.ariaSort = descending ? "descending" : "ascending";
    const key = (row) => keyOf(row.cells[heading.cellIndex], heading.classList.contains("number"));
    body.append(...[...body.rows].sort(byKey(key, descending ? -1 : 1)));
  });
}

// pictures: a threshold of null is the stored one of each run
const thresholdOf = (run, k, chosen) => (chosen === null ? pictures.runs[run].threshold[k] : chosen);
const decoded = new Map();
async function pixelsOf(address) {
  if (!decoded.has(address)) {
    decoded.set(address, (async () => {
      const image = element("img", { src: address });
      await image.decode();
      const canvas = element("canvas", { width: image.naturalWidth, height: image.naturalHeight });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, canvas.width, canvas.height);
    })());
    if (decoded.size > 150) decoded.delete(decoded.keys().next().value);
  }
  return decoded.get(address);
}
function maskOf(stacked, k, size, least) {
  const length = size[0] * size[1], mask = new Uint8Array(length), offset = k * length;
  for (let n = 0; n < length; n++) mask[n] = stacked.data[4 * (offset + n)] >= least ? 1 : 0;
  return mask;
}
// the step of a probability is at least this where the probability is at least the threshold
const leastStep = (threshold) => threshold * pictures.levels - 1e-6;
function overlap(truth, mask) {
  const found = { both: 0, false: 0, missed: 0 };
  for (let n = 0; n < mask.length; n++) {
    if (mask[n]) found[truth[n] ? "both" : "false"]++;
    else if (truth[n]) found.missed++;
  }
  return found;
}
const diceOf = ({ both, false: wrong, missed }) =>
  both + wrong + missed === 0 ? pictures.empty : (2 * both) / (2 * both + wrong + missed);
function put(canvas, base, change) {
  const drawn = new ImageData(new Uint8ClampedArray(base.data), base.width, base.height);
  change(drawn.data);
  canvas.width = base.width;
  canvas.height = base.height;
  canvas.getContext("2d").putImageData(drawn, 0, 0);
}
function veil(canvas, base, mask, colour) {
  const { width, height } = base;
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x];
  put(canvas, base, (data) => {
    for (let n = 0; n < mask.length; n++) {
      if (!mask[n]) continue;
      const x = n % width, y = (n - x) / width;
      const inner = inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1);
      for (let c = 0; c < 3; c++) data[4 * n + c] = inner ? 0.75 * data[4 * n + c] + 0.25 * colour[c] : colour[c];
    }
  });
}
function errors(canvas, base, truth, mask) {
  const { truth: right, missed, false: wrong } = pictures.colours;
  put(canvas, base, (data) => {
    for (let n = 0; n < mask.length; n++) {
      const colour = mask[n] ? (truth[n] ? right : wrong) : truth[n] ? missed : null;
      for (let c = 0; c < 3; c++) data[4 * n + c] = colour ? colour[c] : 0.35 * data[4 * n + c];
    }
  });
}
const storedOf = (image, v, s, name) => image.values[v][s]?.[pictures.metrics.indexOf(name)] ?? null;
const captionOf = (image) =>
  `${image.id}, ${image.original[1]} x ${image.original[0]} pixels, ` +
  `${pictures.by} of the variants apart by ${shown(image.apart)}`;
// the class on whose masks the variants differ most
function classOf(image) {
  const spans = pictures.classes.map((name) => {
    const values = pictures.variants.map((_, v) => storedOf(image, v, 0, `dice_image/${name}`));
    const known = values.filter((value) => value !== null);
    return Math.max(0, Math.max(...known) - Math.min(...known));
  });
  return spans.indexOf(Math.max(...spans));
}
const headOf = (v, run) => {
  const { name, seed } = pictures.runs[run];
  const head = element("div", { className: `head v${v % 8}` }, element("i", { className: "swatch" }));
  head.append(element("b", {}, pictures.variants[v]), ` (run ${name}, seed ${seed})`);
  return head;
};

// a figure of masks: image and truth, then prediction and errors of each variant that has a seed in that place
async function drawMasks(figure, image, k, chosen, s) {
  const token = (figure.token = {});
  figure.ariaBusy = "true";
  const given = image.answers.flatMap((of, v) => (s in of ? [[v, of[s]]] : []));
  const [base, truths, ...answers] = await Promise.all(
    [image.image, image.truth, ...given.map(([, answer]) => answer)].map(pixelsOf),
  );
  if (figure.token !== token) return; // another one was asked for meanwhile
  const several = pictures.classes.length > 1;
  const colours = pictures.colours.classes, colour = colours[k % colours.length];
  const truth = maskOf(truths, k, image.size, 128);
  const canvas = (name) => element("canvas", { className: name, role: "img", ariaLabel: `${name} of ${image.id}` });
  const [picture, truthful] = [canvas("image"), canvas("truth")];
  put(picture, base, () => {});
  veil(truthful, base, truth, several ? colour : pictures.colours.truth);
  const strip = element("div", { className: "strip" });
  strip.append(element("div", {}, element("div", { className: "head" }, "image, truth"), picture, truthful));
  given.forEach(([v], n) => {
    const run = image.runs[v][s], threshold = thresholdOf(run, k, chosen);
    const decided = pictures.classes.length + k; // below the steps of probability lie the masks that the run decides for
    const mask =
      chosen === null
        ? maskOf(answers[n], decided, image.size, 128)
        : maskOf(answers[n], k, image.size, leastStep(threshold));
    const [predicted, wrong] = [canvas("prediction"), canvas("errors")];
    veil(predicted, base, mask, several ? colour : colours[0]);
    errors(wrong, base, truth, mask);
    const name = several ? `dice_image/${pictures.classes[k]}` : "dice_image";
    const { cleaned } = pictures.runs[run], word = chosen === null ? "cleaned" : "not cleaned";
    const text = element("div", {}, `threshold ${+threshold.toFixed(4)}${cleaned ? `, ${word}` : ""}: Dice `);
    text.append(element("b", { className: "dice" }, shown(diceOf(overlap(truth, mask)))), " of the picture; ");
    text.append(element("br"), `stored ${shown(storedOf(image, v, s, name))} at original size`);
    if (cleaned) text.append(", cleaned");
    strip.append(element("div", { className: "answer" }, headOf(v, run), predicted, wrong, text));
  });
  const of = several ? `; class ${pictures.classes[k]}` : "";
  figure.replaceChildren(element("figcaption", {}, captionOf(image) + of), strip);
  figure.ariaBusy = "false";
}

// a figure of labels: the image, then the probabilities of each variant
const wanted = (run, probability, chosen, only) => {
  const { threshold } = pictures.runs[run];
  if (chosen !== null) return probability.map((p, k) => (k === only ? p >= chosen : null));
  const most = Math.max(...probability);
  return probability.map((p, k) => (threshold.length ? p >= threshold[k] : p === most));
};
async function drawLabels(figure, image, k, chosen, s) {
  const place = pictures.every.ids.indexOf(image.id), canvas = element("canvas", { className: "image" });
  const token = (figure.token = {});
  figure.ariaBusy = "true";
  const base = await pixelsOf(image.image);
  if (figure.token !== token) return;
  put(canvas, base, () => {});
  const there = pictures.classes.filter((_, n) => image.truth[n]).join(" + ") || "none";
  const strip = element("div", { className: "strip" });
  strip.append(element("div", {}, element("div", { className: "head" }, `truth: ${there}`), canvas));
  image.runs.forEach((of, v) => {
    if (!(s in of)) return;
    const run = of[s], probability = pictures.every.probability[v][s][place];
    const decided = wanted(run, probability, chosen, k);
    const odds = element("div", { className: "odds" });
    pictures.classes.forEach((name, n) => {
      const fill = element("div", { className: image.truth[n] ? "fill there" : "fill" });
      fill.style.width = `${100 * probability[n]}%`;
      const track = element("div", { className: "track" }, fill);
      const cut = chosen === null ? pictures.runs[run].threshold[n] : n === k ? chosen : undefined;
      if (cut !== undefined) {
        const mark = element("div", { className: "cut", title: `threshold ${cut}` });
        mark.style.left = `${100 * cut}%`;
        track.append(mark);
      }
      const verdict = element("span", {}, shown(probability[n], 3));
      if (decided[n] !== null) {
        const right = decided[n] === image.truth[n];
        const word = element("span", { className: right ? "right" : "wrong" }, decided[n] ? " yes" : " no");
        verdict.append(word);
      }
      odds.append(element("span", {}, name), track, verdict);
    });
    strip.append(element("div", { className: "answer" }, headOf(v, run), odds));
  });
  figure.replaceChildren(element("figcaption", {}, captionOf(image)), strip);
  figure.ariaBusy = "false";
}
function ratesOf(v, s, k, chosen) {
  const { truth, probability, runs } = pictures.every;
  let [tp, fp, fn, tn] = [0, 0, 0, 0];
  truth.forEach((there, n) => {
    const decided = wanted(runs[v][s][n], probability[v][s][n], chosen, k)[k];
    if (there[k]) decided ? tp++ : fn++;
    else decided ? fp++ : tn++;
  });
  return { sensitivity: tp / (tp + fn), specificity: tn / (tn + fp), accuracy: (tp + tn) / truth.length, tp, fp, fn, tn };
}

const key = () => {
  const { truth, missed, false: wrong, classes } = pictures.colours;
  const entries = [["truth, and found", truth], ["missed", missed], ["falsely found", wrong]];
  if (pictures.classes.length === 1) entries.push(["prediction", classes[0]]);
  return entries.map(([name, colour]) => {
    const patch = element("i");
    patch.style.background = `rgb(${colour})`;
    return element("span", {}, patch, name);
  });
};

function browse() {
  const labels = pictures.target === "label", draw = labels ? drawLabels : drawMasks;
  const at = (id) => document.getElementById(id);
  const [sort, order, find, list, slider, detail] = ["sort", "order", "find", "list", "threshold", "detail"].map(at);
  const state = { image: 0, k: 0, s: 0, threshold: null, descending: true };

  sort.append(element("option", { value: "apart" }, `disagreement: range of ${pictures.by} over variants`));
  sort.append(element("option", { value: "id" }, "name"));
  pictures.variants.forEach((name, v) => {
    const group = element("optgroup", { label: name });
    pictures.metrics.forEach((metric, m) => group.append(element("option", { value: `${v} ${m}` }, metric)));
    sort.append(group);
  });
  pictures.classes.forEach((name, k) => at("class").append(element("option", { value: k }, name)));
  at("classes").hidden = pictures.classes.length < 2;
  const places = Math.max(...pictures.seeds.map((of) => of.length));
  for (let s = 0; s < places; s++) {
    const names = new Set(pictures.seeds.flatMap((of) => of[s] ?? [])); // variants may have others
    at("seed").append(element("option", { value: s }, [...names].join(" / ")));
  }
  at("seeds").hidden = places < 2;

  const valueOf = (image) => {
    if (sort.value === "apart" || sort.value === "id") return image[sort.value];
    const [v, m] = sort.value.split(" ");
    return image.values[v][state.s]?.[m] ?? null;
  };
  const options = pictures.images.map((image, n) => {
    const words = element("span", { title: image.id }, element("em", {}, image.id), element("b"));
    const option = element("li", { role: "option", id: `image${n}` });
    option.append(element("img", { src: image.image, alt: "", loading: "lazy" }), words);
    option.addEventListener("click", () => select(n));
    return option;
  });
  let listed = [];
  const holds = (id) => id.toLowerCase().includes(find.value.toLowerCase());
  const arrange = () => {
    const found = [...pictures.images.keys()].filter((n) => holds(pictures.images[n].id));
    listed = found.sort(byKey((n) => valueOf(pictures.images[n]), state.descending ? -1 : 1));
    for (const n of listed) {
      const value = valueOf(pictures.images[n]);
      options[n].querySelector("b").textContent = typeof value === "string" ? "" : shown(value);
    }
    list.replaceChildren(...listed.map((n) => options[n]));
    order.textContent = state.descending ? "descending" : "ascending";
  };
  const select = (n) => {
    state.image = n;
    options.forEach((option, other) => (option.ariaSelected = String(other === n)));
    list.setAttribute("aria-activedescendant", `image${n}`);
    options[n].scrollIntoView({ block: "nearest", inline: "nearest" });
    redraw();
  };
  const step = (by) => {
    if (!listed.length) return;
    const place = listed.indexOf(state.image);
    select(listed[Math.max(0, Math.min(listed.length - 1, place + by))]);
  };
  const redraw = () => {
    const image = pictures.images[state.image];
    const there = image.runs.flatMap((of) => of[state.s] ?? []);
    const stored = there.map((run) => pictures.runs[run].threshold[state.k]);
    if (state.threshold === null && stored[0] !== undefined) slider.value = stored[0];
    const words = stored[0] === undefined ? "the most probable" : stored.map((t) => +t.toFixed(4)).join(" / ");
    at("at").textContent = state.threshold === null ? `stored: ${words}` : state.threshold.toFixed(3);
    at("stored").disabled = state.threshold === null;
    if (labels) rates();
    return draw(detail, image, state.k, state.threshold, state.s);
  };
  const rates = () => {
    const head = ["variant", "sensitivity", "specificity", "accuracy", "tp", "fp", "fn", "tn"];
    const rows = pictures.variants.flatMap((name, v) => {
      if (!(state.s in pictures.seeds[v])) return [];
      const found = ratesOf(v, state.s, state.k, state.threshold);
      const values = head.slice(1).map((word) => shown(found[word], word.length > 2 ? 4 : 0));
      return element("tr", {}, ...[name, ...values].map((text) => element("td", {}, text)));
    });
    const folds = pictures.every.runs.some((of) => new Set(of[state.s]).size > 1); // with a threshold each
    const cut = folds && state.threshold === null ? "what each fold has stored" : at("at").textContent;
    const title = `${pictures.classes[state.k]}: of all ${pictures.every.truth.length} images, at ${cut}`;
    const table = element("table", {}, element("caption", {}, title));
    table.append(element("thead", {}, element("tr", {}, ...head.map((word) => element("th", { scope: "col" }, word)))));
    table.append(element("tbody", {}, ...rows));
    at("labels").replaceChildren(element("div", { className: "wide" }, table));
  };
  const move = (threshold) => {
    state.threshold = threshold;
    redraw();
  };

  sort.addEventListener("change", () => {
    const metric = sort.value.includes(" ");
    state.descending = sort.value === "apart" || (metric && state.descending);
    arrange();
    step(-Infinity);
  });
  order.addEventListener("click", () => {
    state.descending = !state.descending;
    arrange();
    step(-Infinity);
  });
  find.addEventListener("input", arrange);
  at("class").addEventListener("change", (event) => {
    state.k = Number(event.target.value);
    redraw();
  });
  at("seed").addEventListener("change", (event) => {
    state.s = Number(event.target.value);
    arrange();
    redraw();
  });
  slider.addEventListener("input", () => move(Number(slider.value)));
  at("stored").addEventListener("click", () => move(null));
  document.querySelector("#browser form").addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      event.preventDefault();
      step(steps[event.key]);
    }
  });

  arrange();
  select(listed[0]);
}

function most() {
  const figures = document.querySelector("#most .figures"), draw = pictures.target === "label" ? drawLabels : drawMasks;
  for (const image of pictures.images.slice(0, pictures.most)) {
    const figure = element("figure");
    figures.append(figure);
    draw(figure, image, classOf(image), null, 0);
  }
}

if (pictures) {
  const masks = pictures.target === "mask", number = pictures.images.length;
  const cleaned = pictures.runs.some((run) => run.cleaned);
  const note = [
    masks ? `Dice is that of the picture, at most ${pictures.side} pixels long: beside it stands the stored value.` : "",
    masks ? `Probabilities are in ${pictures.levels} steps, at the stored temperature.` : "",
    cleaned ? "Masks are cleaned as by the run at the stored threshold, and not at another." : "",
  ].join(" ");
  document.querySelector("#most .note").textContent = `Each variant is shown by its first seed. ${note}`;
  document.querySelector("#browser .note").textContent =
    (number === pictures.of
      ? `All ${number} images. `
      : `${number} of ${pictures.of} images: ${pictures.variants.length > 1 ? "half are those on which the variants disagree most, the others" : "they"} lie evenly from the worst to the best. `) +
    `The arrow keys go from image to image in the list and move the threshold on the slider. ${note}`;
  if (masks) for (const place of document.querySelectorAll(".key")) place.append(...key());
  if (pictures.most) most();
  else document.getElementById("most").hidden = true;
  browse();
} else {
  for (const link of document.querySelectorAll("nav .pictured")) link.hidden = true;
}
