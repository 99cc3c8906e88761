"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const images = data.images.map((image) => ({ ...image, anomalous: image.label ? image.label === "anomalous" : null }));
  const labelled = images.some((image) => image.anomalous !== null);
  const PAGE = 60; // cards that are made at once
  const byId = (id) => document.getElementById(id);
  let threshold = data.threshold;
  let listed = []; // indices into images that pass the filters, in the order shown
  let made = 0; // how many of them have a card
  let open = 0; // which of them the dialog shows

  // Text from outside is only ever set as textContent.
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const set = (made, attributes) => Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  const drawing = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    set(made, attributes);
    made.textContent = text;
    return made;
  };
  const facts = (list, pairs) => list.replaceChildren(...pairs.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  const short = (number) => String(Number(number.toPrecision(4)));
  const percent = (part, whole) => whole ? `${(100 * part / whole).toFixed(1)}%` : "none";
  const share = (part, whole) => whole ? (part / whole).toFixed(3) : "undefined";

  // Decisions. The same rule as everywhere: anomalous where the score is above the threshold.
  const judged = (image) => image.score > threshold;
  const verdict = (image) => {
    if (image.anomalous === null || image.anomalous === judged(image)) return judged(image) ? "anomalous" : "normal";
    return image.anomalous ? "missed" : "false-alarm";
  };
  const WORDS = { anomalous: "▲ anomalous", normal: "normal", missed: "✗ missed", "false-alarm": "✗ false alarm" };
  const countAbove = (scores) => scores.reduce((count, score) => count + (score > threshold), 0);

  // The axis that the histogram and the slider share: logarithmic where the scores spread over decades.
  const scores = images.map((image) => image.score);
  const all = [...scores, ...data.held_out, data.threshold].filter(Number.isFinite);
  const least = all.reduce((a, b) => Math.min(a, b)), most = all.reduce((a, b) => Math.max(a, b));
  const logarithmic = least > 0 && most > 50 * least;
  const bend = logarithmic ? Math.log10 : (value) => value;
  const unbend = logarithmic ? (value) => 10 ** value : (value) => value;
  const margin = (bend(most) - bend(least) || 1) / 50;
  const low = bend(least) - margin, high = bend(most) + margin;
  const place = (value) => Math.min(1, Math.max(0, (bend(value) - low) / (high - low)));
  const ticks = () => {
    if (logarithmic) {
      const found = [];
      for (let power = Math.floor(low); power <= high; power++)
        for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
      const inside = found.filter((value) => bend(value) >= low && bend(value) <= high);
      return inside.length > 7 ? inside.filter((value) => /^[^25]*$/.test(value.toExponential()[0])) : inside;
    }
    const step = 10 ** Math.floor(Math.log10((high - low) / 3));
    const wide = (high - low) / step > 8 ? 2 * step : step;
    const found = [];
    for (let value = Math.ceil(low / wide) * wide; value <= high; value += wide) found.push(Number(value.toPrecision(6)));
    return found;
  };

  const BINS = 48, HEIGHT = 180, FOOT = 18, HEAD = 18;
  const binned = (values) => {
    const shares = new Array(BINS).fill(0);
    for (const value of values) shares[Math.min(BINS - 1, Math.floor(place(value) * BINS))] += 1 / values.length;
    return shares;
  };
  const groups = [
    ...(labelled
      ? [["bar-normal", "normal images", scores.filter((_, i) => !images[i].anomalous)],
         ["bar-anomalous", "anomalous images", scores.filter((_, i) => images[i].anomalous)]]
      : [["bar-normal", "these images", scores]]),
    ["held-out", "held-out normal images", data.held_out],
  ].filter(([, , values]) => values.length);
  const shares = groups.map(([style, , values]) => [style, binned(values)]);
  let width = 0; // of the histogram, in pixels of the screen: its words stay readable on a phone
  const histogram = () => {
    width = byId("histogram").clientWidth;
    const top = Math.max(...shares.flatMap(([, bins]) => bins));
    const y = (value) => HEAD + (HEIGHT - FOOT - HEAD) * (1 - value / top);
    const svg = drawing("svg", { viewBox: `0 0 ${width} ${HEIGHT}` });
    for (const [style, bins] of shares) {
      if (style === "held-out") {
        const steps = bins.map((value, bin) => `L${bin * width / BINS} ${y(value)}H${(bin + 1) * width / BINS}`);
        svg.append(drawing("path", { class: style, d: `M0 ${y(0)}${steps.join("")}V${y(0)}` }));
      } else bins.forEach((value, bin) => value && svg.append(drawing("rect", {
        class: style, x: bin * width / BINS + 0.5, width: width / BINS - 1, y: y(value), height: y(0) - y(value),
      })));
    }
    svg.append(drawing("line", { class: "axis", x1: 0, x2: width, y1: y(0), y2: y(0) }));
    for (const value of ticks())
      svg.append(drawing("text", { x: place(value) * width, y: HEIGHT - 3, "text-anchor": "middle" }, short(value)));
    svg.append(drawing("line", { id: "mark", class: "threshold", y1: HEAD - 4, y2: HEIGHT - FOOT }));
    svg.append(drawing("text", { id: "mark-text", y: HEAD - 8 }));
    byId("histogram").replaceChildren(svg);
    mark();
  };
  const mark = () => {
    const x = place(threshold) * width;
    set(byId("mark"), { x1: x, x2: x });
    set(byId("mark-text"), { x, "text-anchor": x < 40 ? "start" : x > width - 40 ? "end" : "middle" });
    byId("mark-text").textContent = short(threshold);
  };

  // Curves over every threshold that separates two scores; images come with the highest score first.
  const operatingPoints = () => {
    const positives = images.filter((image) => image.anomalous).length, negatives = images.length - positives;
    const points = [];
    let found = 0, alarms = 0;
    images.forEach((image, i) => {
      if (image.anomalous) found += 1; else alarms += 1;
      if (i + 1 === images.length || images[i + 1].score < image.score)
        points.push({ tpr: found / positives, fpr: alarms / negatives, precision: found / (found + alarms) });
    });
    return points;
  };
  const SIDE = 200;
  const curve = (id, d, names, chance) => {
    const svg = drawing("svg", { viewBox: `-46 -8 ${SIDE + 54} ${SIDE + 48}` });
    svg.append(drawing("rect", { class: "axis", x: 0, y: 0, width: SIDE, height: SIDE, fill: "none" }));
    svg.append(drawing("line", { class: "chance", ...chance }));
    svg.append(drawing("path", { class: "curve", d }));
    svg.append(drawing("circle", { class: "point", id: `${id}-point`, r: 5 }));
    for (const value of [0, 0.5, 1]) {
      svg.append(drawing("text", { x: value * SIDE, y: SIDE + 16, "text-anchor": "middle" }, String(value)));
      svg.append(drawing("text", { x: -6, y: SIDE * (1 - value) + 4, "text-anchor": "end" }, String(value)));
    }
    svg.append(drawing("text", { x: SIDE / 2, y: SIDE + 34, "text-anchor": "middle" }, names[0]));
    svg.append(drawing("text", { transform: `translate(-34 ${SIDE / 2}) rotate(-90)`, "text-anchor": "middle" }, names[1]));
    byId(id).replaceChildren(svg);
  };
  const curves = () => {
    const points = operatingPoints();
    const at = (x, y) => `${(x * SIDE).toFixed(2)} ${((1 - y) * SIDE).toFixed(2)}`;
    const base = images.filter((image) => image.anomalous).length / images.length;
    curve("roc", `M${at(0, 0)}` + points.map((p) => `L${at(p.fpr, p.tpr)}`).join(""),
      ["normal images flagged", "anomalies found"], { x1: 0, y1: SIDE, x2: SIDE, y2: 0 });
    const steps = points.map((p, i) => `L${at(i ? points[i - 1].tpr : 0, p.precision)}L${at(p.tpr, p.precision)}`);
    curve("pr", `M${at(0, points[0].precision)}` + steps.join(""),
      ["anomalies found (recall)", "flagged rightly (precision)"],
      { x1: 0, x2: SIDE, y1: (1 - base) * SIDE, y2: (1 - base) * SIDE });
    byId("roc-title").textContent = `ROC, area ${data.auroc.toFixed(3)}`;
    byId("pr-title").textContent = `precision and recall, average precision ${data.auprc.toFixed(3)}`;
  };

  const update = () => {
    const flagged = countAbove(scores), heldOut = countAbove(data.held_out);
    byId("summary").textContent =
      `${flagged} of ${images.length} images are anomalous at threshold ${short(threshold)}` +
      (data.skipped.length ? `; ${data.skipped.length} could not be read` : "");
    const lines = [`flags ${flagged} of ${images.length} images (${percent(flagged, images.length)})`];
    if (data.held_out.length)
      lines.push(`would flag ${heldOut} of the ${data.held_out.length} held-out normal images ` +
        `(${percent(heldOut, data.held_out.length)}, the false alarms to expect)`);
    byId("outcome").replaceChildren(...lines.map((line) => element("li", { textContent: line })));
    byId("command").textContent = `python -m raccgan.calibrate ${quoted(data.run || "RUN")} --threshold ${Number(threshold.toPrecision(9))}`;
    mark();
    if (labelled) updateTruth();
  };
  const quoted = (text) => /^[\w@%+=:,.\/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
  const updateTruth = () => {
    const count = (truth, decision) =>
      images.reduce((sum, image) => sum + (image.anomalous === truth && judged(image) === decision), 0);
    const [tp, fn, fp, tn] = [count(true, true), count(true, false), count(false, true), count(false, false)];
    for (const [id, value] of Object.entries({ tp, fn, fp, tn })) byId(id).textContent = value;
    facts(byId("rates"), [
      ["precision", share(tp, tp + fp)], ["recall", share(tp, tp + fn)],
      ["F1", share(2 * tp, 2 * tp + fp + fn)], ["false alarms", percent(fp, fp + tn)],
    ]);
    const [roc, pr] = [byId("roc-point"), byId("pr-point")];
    if (!roc) return;
    set(roc, { cx: SIDE * fp / (fp + tn), cy: SIDE * (1 - tp / (tp + fn)) });
    set(pr, { cx: SIDE * tp / (tp + fn), cy: SIDE * (1 - (tp + fp ? tp / (tp + fp) : 1)) });
  };

  // Pictures lie in blocks of the page, so that none is read before an image of it is in sight.
  const blocks = new Map();
  const strip = (index) => {
    const number = Math.floor(index / data.block);
    if (!blocks.has(number)) blocks.set(number, byId(`strips-${number}`).textContent.split("\n"));
    return blocks.get(number)[index % data.block];
  };
  const sharpen = (picture) => {
    const enlarged = () => picture.classList.toggle("pixels", picture.naturalHeight <= 32);
    if (picture.complete) enlarged(); else picture.addEventListener("load", enlarged, { once: true });
  };

  const card = (index) => {
    const image = images[index];
    const picture = element("img", { className: "picture", alt: "", src: strip(index) });
    sharpen(picture);
    const isolated = element("bdi", { textContent: image.path }); // the line is cut at its left: the file's name stays
    const made = element("button", { type: "button", title: image.path },
      element("span", { className: "frame" }, picture),
      element("span", { className: "words" },
        element("span", { className: "name" }, isolated),
        element("span", { className: "verdict" }),
        element("span", { className: "score", textContent: short(image.score) }),
        element("span", { className: "quiet", textContent: described(image) })));
    made.dataset.index = index;
    judge(made);
    return made;
  };
  // What holds for every image says nothing of one; enlarged, it is named all the same.
  const several = new Set(images.map((image) => image.nearest_class)).size > 1;
  const described = (image) => [
    ...(labelled ? [`class ${image.class}`] : []), ...(several ? [`nearest to ${image.nearest_class}`] : []),
  ].join(", ");
  const judge = (made) => {
    const image = images[made.dataset.index], found = verdict(image);
    made.className = `card ${judged(image) ? "anomalous" : "normal"}`;
    Object.assign(made.querySelector(".verdict"), { className: `verdict ${found}`, textContent: WORDS[found] });
  };

  const classOf = (image) => labelled ? image.class : image.nearest_class;
  const ORDERS = {
    high: (a, b) => a - b, // as they come
    low: (a, b) => b - a,
    near: (a, b) => Math.abs(images[a].score - threshold) - Math.abs(images[b].score - threshold),
    name: (a, b) => images[a].path < images[b].path ? -1 : 1,
  };
  const list = () => {
    const show = byId("show").value, wanted = byId("class").value, text = byId("search").value.toLowerCase();
    listed = [];
    images.forEach((image, index) => {
      const decided = show === "all" || show === verdict(image) ||
        (show === "anomalous" && judged(image)) || (show === "normal" && !judged(image));
      if (decided && (!wanted || classOf(image) === wanted) && image.path.toLowerCase().includes(text)) listed.push(index);
    });
    listed.sort(ORDERS[byId("order").value]);
    byId("count").textContent = listed.length === images.length ? `All ${listed.length}.`
      : `${listed.length} of ${images.length}.`;
    byId("cards").replaceChildren();
    made = 0;
    more();
  };
  const more = () => {
    const next = listed.slice(made, made + PAGE);
    byId("cards").append(...next.map(card));
    made += next.length;
  };
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && made < listed.length && more(),
    { rootMargin: "800px" }).observe(byId("more"));

  const enlarge = (where) => {
    open = Math.min(listed.length - 1, Math.max(0, where));
    const index = listed[open], image = images[index], source = strip(index);
    byId("large-name").textContent = image.path;
    const size = Object.assign(new Image(), { src: source });
    const frames = [...document.querySelectorAll("#large-pictures div")];
    for (const frame of frames) frame.style.backgroundImage = `url("${source}")`;
    size.decode().then(() => frames.forEach((frame) => frame.classList.toggle("pixels", size.naturalHeight <= 32)));
    facts(byId("large-facts"), [
      ["score", short(image.score)], ["decision", WORDS[verdict(image)]], ["threshold", short(threshold)],
      ...(labelled ? [["class", image.class]] : []), ["nearest normal class", image.nearest_class],
      ...Object.entries(data.terms).map(([name, title]) => [title, short(image[name])]),
      ["largest difference", short(image.map_max) +
        (image.map_x === null ? "" : ` at x ${image.map_x}, y ${image.map_y}`)],
    ]);
    byId("previous").disabled = open === 0;
    byId("next").disabled = open === listed.length - 1;
    if (!byId("large").open) byId("large").showModal();
  };
  const focusCard = (where) => {
    if (where < 0 || where >= listed.length) return;
    while (made <= where) more();
    byId("cards").children[where].focus();
  };
  const focused = () => [...byId("cards").children].indexOf(document.activeElement);

  let waiting = false;
  const change = (value) => {
    threshold = value;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      update();
      if (byId("show").value === "all" && byId("order").value !== "near") [...byId("cards").children].forEach(judge);
      else list();
    });
  };
  const write = () => { byId("threshold").value = short(threshold); };
  byId("slider").addEventListener("input", (event) => {
    const wide = low + (high - low) * event.target.value / event.target.max;
    change(Number(unbend(wide).toPrecision(6)));
    write();
  });
  byId("threshold").addEventListener("change", (event) => {
    const value = Number(event.target.value);
    if (event.target.value.trim() && Number.isFinite(value)) {
      change(value);
      byId("slider").value = place(value) * byId("slider").max;
    } else write();
  });
  byId("reset").addEventListener("click", () => {
    change(data.threshold);
    write();
    byId("slider").value = place(data.threshold) * byId("slider").max;
  });
  for (const id of ["show", "class", "order"]) byId(id).addEventListener("change", list);
  byId("search").addEventListener("input", list);
  byId("cards").addEventListener("click", (event) => {
    const chosen = event.target.closest(".card");
    if (chosen) enlarge([...byId("cards").children].indexOf(chosen));
  });
  byId("previous").addEventListener("click", () => enlarge(open - 1));
  byId("next").addEventListener("click", () => enlarge(open + 1));
  byId("close").addEventListener("click", () => byId("large").close());
  byId("large").addEventListener("close", () => focusCard(open));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, select")) return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && byId("large").open) enlarge(open + step);
    else if (step) focusCard(focused() < 0 ? 0 : focused() + step);
    else if (event.key === "/" && !byId("large").open) byId("search").focus();
    else return;
    event.preventDefault();
  });

  facts(byId("facts"), Object.entries(data.facts));
  byId("stored").textContent = short(data.threshold);
  for (const name of [...new Set(images.map(classOf))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true })))
    byId("class").append(element("option", { value: name, textContent: name }));
  byId("class").parentElement.hidden = byId("class").length < 3; // all, and one class
  if (labelled) {
    document.querySelector("main").classList.add("labelled");
    byId("truth").hidden = false;
    byId("class-name").textContent = "class";
  } else document.querySelectorAll("[data-needs-labels]").forEach((option) => option.remove());
  if (data.skipped.length) {
    byId("skipped").hidden = false;
    document.querySelector("#skipped summary").textContent = `${data.skipped.length} files could not be read`;
    document.querySelector("#skipped ul").append(...data.skipped.map(({ reason }) => element("li", { textContent: reason })));
  }
  for (const [style, name, values] of groups)
    byId("legend").append(element("li", {}, element("i", { className: style }), `${name} (${values.length})`));
  new ResizeObserver(histogram).observe(byId("histogram"));
  histogram();
  if (data.auroc !== null && data.auprc !== null) curves(); else byId("curves").hidden = true;
  byId("slider").value = place(threshold) * byId("slider").max;
  write();
  update();
  list();
})();
