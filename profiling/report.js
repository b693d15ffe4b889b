"use strict";
// Draws the data of one request: nothing is fetched, and nothing but this page is touched.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page"), card = document.getElementById("card");
const NARROW = 640, ROW = 34, PATH = 4, GHOST = 7, GAP = 14;

const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const colour = (label) => data.colours[label] || data.colours[""];
const percent = (part, whole) => `${(100 * part / whole).toFixed(0)}%`;
const si = (value, unit) => {
  const [scale, prefix] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([s]) => value >= s) || [1, ""];
  return `${(value / scale).toFixed(value / scale < 10 ? 2 : 1)} ${prefix}${unit}`;
};
const time = (seconds) => seconds >= 1 ? `${seconds.toFixed(2)} s` : seconds >= 1e-3 ? `${(seconds * 1e3).toFixed(2)} ms` : `${(seconds * 1e6).toFixed(1)} us`;
const operations = Object.fromEntries(data.operations.map((op) => [op.name, op]));

function section(html, parent = page) {
  const element = document.createElement("section");
  element.innerHTML = html;
  parent.append(element);
  return element;
}

// ---- what a bar says when it is pointed at, focused or touched
function details(bar, lane, panel) {
  const lines = [`<b>${escape(bar.name)}</b>`, `lane ${lane}${bar.label ? `, ${escape(bar.label)}` : ""}${bar.level ? `, level ${bar.level}` : ""}`];
  lines.push(`${time(bar.end - bar.start)}, ${percent(bar.end - bar.start, panel.seconds)} of the request, from ${time(bar.start)}`);
  const op = operations[bar.name];
  if (op) {
    const seconds = bar.end - bar.start;
    lines.push(`${si(op.flops, "FLOP")}, ${si(op.flops / seconds, "FLOP/s")}`, `${si(op.bytes, "B")}, ${si(op.bytes / seconds, "B/s")}`);
    const floor = Math.max(op.flops / data.floor.flops_per_s, op.bytes / data.floor.bytes_per_s);
    lines.push(`floor ${time(floor)}: ${percent(floor, seconds)} of what ${escape(data.floor.of)} reaches at best`);
  }
  if (bar.critical) lines.push("on the critical path");
  return lines.join("<br>");
}

function show(html, box) {
  card.innerHTML = html;
  card.hidden = false;
  const mine = card.getBoundingClientRect();
  const x = Math.min(Math.max(12, box.left + box.width / 2 - mine.width / 2), innerWidth - mine.width - 12);
  const above = box.top - mine.height - 10;
  card.style.left = `${x}px`;
  card.style.top = `${above > 8 ? above : Math.min(box.bottom + 10, innerHeight - mine.height - 8)}px`;
}

function listen(holder, panel) {
  const reveal = (event) => {
    const bar = event.target.closest(".bar");
    if (!bar) return;
    const [lane, i] = bar.dataset.at.split(".").map(Number);
    show(details(panel.lanes[lane].bars[i], lane, panel), bar.getBoundingClientRect());
  };
  const hide = () => { card.hidden = true; };
  for (const kind of ["pointerover", "focusin", "click"]) holder.addEventListener(kind, reveal);
  for (const kind of ["pointerleave", "focusout"]) holder.addEventListener(kind, hide);
  holder.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !event.target.closest(".bar")) return;
    const bars = [...holder.querySelectorAll(".bar")];
    (bars[bars.indexOf(event.target.closest(".bar")) + step] || event.target).focus();
    event.preventDefault();
  });
}

// ---- lanes: a row each, bars by stream, the critical path as a line below, the planner's prediction below that
function draw(panel, holder) {
  const width = holder.clientWidth, narrow = width < NARROW, left = narrow ? 0 : 112, head = narrow ? 18 : 0;
  const span = Math.max(panel.seconds, panel.predicted ? panel.predicted.makespan : 0);
  const step = head + ROW + PATH + 3 + (panel.predicted ? GHOST + 3 : 0) + GAP;
  const x = (seconds) => left + seconds / span * (width - left - 1), y = (lane) => 26 + lane * step + head;
  const out = [], height = 26 + panel.lanes.length * step;
  const rough = span / (narrow ? 3 : 8), power = 10 ** Math.floor(Math.log10(rough));
  const tick = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  for (let t = 0; t <= span; t += tick) {
    out.push(`<line x1="${x(t)}" x2="${x(t)}" y1="18" y2="${height - GAP}" stroke="var(--line)"/>`);
    if (x(t) < width - 44) out.push(`<text class="soft" x="${x(t) + 3}" y="13">${t ? time(t).replace(/\.?0+ /, " ") : "0"}</text>`);
  }
  panel.lanes.forEach((row, lane) => {
    const name = `lane ${lane}${row.coordinator ? ", coordinator" : ""}`;
    if (narrow) out.push(`<text x="0" y="${y(lane) - 5}">${name}</text>`);
    else out.push(`<text x="0" y="${y(lane) + 15}" font-weight="600">lane ${lane}</text><text class="soft" x="0" y="${y(lane) + 30}">${row.coordinator ? "coordinator" : ""}</text>`);
    out.push(`<rect x="${left}" y="${y(lane)}" width="${width - left}" height="${ROW}" rx="4" fill="var(--lane)"/>`);
    row.bars.forEach((bar, i) => {
      const a = x(bar.start), w = Math.max(1.2, x(bar.end) - a - 0.6), side = ["wait", "send"].includes(bar.kind);
      const fill = side ? `var(--${bar.kind})` : colour(bar.label), inset = side ? 9 : 2;
      const text = side ? bar.name : bar.kind === "operation" ? bar.name.replace("downsamples_2", "down") : bar.name;
      out.push(`<g class="bar ${escape(bar.kind)}" tabindex="0" role="img" data-at="${lane}.${i}" aria-label="${escape(bar.name)}, ${time(bar.end - bar.start)}">`
        + `<rect x="${a}" y="${y(lane) + inset}" width="${w}" height="${ROW - 2 * inset}" rx="${Math.min(3, w / 3)}" fill="${fill}"/>`
        + (w > text.length * 6.6 + 8 ? `<text x="${a + 6}" y="${y(lane) + ROW / 2 + 4}">${escape(text)}</text>` : "") + "</g>");
    });
  });
  for (const s of panel.path) {
    out.push(`<rect class="path" x="${x(s.start)}" y="${y(s.lane) + ROW + 2}" width="${Math.max(1, x(s.end) - x(s.start))}" height="${PATH}" opacity="${s.kind === "computing" ? 1 : 0.45}"/>`);
  }
  for (const [lane, name, start, end] of panel.predicted ? panel.predicted.runs : []) {
    out.push(`<rect x="${x(start)}" y="${y(lane) + ROW + PATH + 5}" width="${Math.max(1, x(end) - x(start) - 0.6)}" height="${GHOST}" rx="2" fill="${colour((operations[name] || {}).label)}" opacity=".55"/>`);
  }
  for (const a of panel.arrows) {
    const down = a.to > a.from, x0 = x(a.start), x1 = x(a.end), y0 = y(a.from) + (down ? ROW : 0), y1 = y(a.to) + (down ? -1 : ROW + 1), middle = (y0 + y1) / 2;
    out.push(`<path class="arrow${a.critical ? " critical" : ""}" marker-end="url(#tip)" d="M${x0},${y0} C${x0},${middle} ${x1},${middle} ${x1},${y1}"/>`);
  }
  const tip = '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0L8,4L0,8z" fill="context-stroke"/></marker></defs>';
  holder.innerHTML = `<svg height="${height}" viewBox="0 0 ${width} ${height}">${tip}${out.join("")}</svg>`;
}

function timeline(panel) {
  const prediction = panel.predicted
    ? ` The thin row below each lane is the planner's prediction, ${time(panel.predicted.makespan)} against ${time(panel.seconds)} measured, from ${escape(panel.predicted.sources.join("; "))}.` : "";
  const holder = section(`<h2>${panel.title}, ${time(panel.seconds)}</h2><p class="soft"><small>${escape(panel.note)}${prediction}`
    + ` Solid arrows: transfers on the critical path.</small></p><div class="draw"></div>`).querySelector(".draw");
  listen(holder, panel);
  new ResizeObserver(() => draw(panel, holder)).observe(holder);
}

function table(head, rows) {
  const cells = (kind, row) => `<tr>${row.map((cell) => `<${kind}>${cell}</${kind}>`).join("")}</tr>`;
  return `<div class="scroll"><table><thead>${cells("th", head)}</thead><tbody>${rows.map((row) => cells("td", row)).join("")}</tbody></table></div>`;
}

function main() {
  const a = data.about, header = document.createElement("header");
  const shade = (s) => s.kind === "computing" ? colour(s.label) : ({ waiting: "var(--wait)", sending: "var(--send)" })[s.kind] || "var(--soft)";
  header.innerHTML = `<h1>${escape(data.headline)}</h1><p class="soft">${a.lanes} lane(s), ${escape(a.executor)} executor, ${escape(a.device)}, ${escape(a.dtype)}, batch ${escape(a.batch)}, `
    + `${escape(a.size)} x ${escape(a.size)} pixels; ${escape(a.cores)} cores, load ${escape(a.load)}; torch ${escape(a.torch)}; ${escape(a.date)}</p>`
    + `<div class="shares" role="img" aria-label="${escape(data.headline)}">${data.shares.map((s) => `<div title="${escape(s.text)}, ${percent(s.seconds, data.total)}" style="width:${100 * s.seconds / data.total}%;background:${shade(s)}"></div>`).join("")}</div>`
    + `<ul class="legend">${data.shares.filter((s) => s.seconds > data.total / 200).map((s) => `<li><i style="background:${shade(s)}"></i>${escape(s.text)} <b>${percent(s.seconds, data.total)}</b></li>`).join("")}</ul>`;
  page.append(header);
  data.panels.forEach(timeline);
  const legend = document.createElement("ul");
  legend.className = "legend";
  const swatches = [...data.labels.map((l) => [colour(l), l]), ["var(--wait)", "waiting"], ["var(--send)", "sending"], ["var(--lane)", "idle"]];
  legend.innerHTML = swatches.map(([c, text]) => `<li><i style="background:${c}"></i>${escape(text)}</li>`).join("")
    + '<li><i class="thin" style="background:var(--path)"></i>critical path, paler where nothing computes</li>';
  page.querySelector("section h2").after(legend);
  const two = document.createElement("div");
  two.className = "two";
  page.append(two);
  section(`<h2>Lanes</h2>${table(["lane", "computing", "waiting", "sending", "idle"], data.lanes.map((l) =>
    [`lane ${l.lane}`, ...["computing", "waiting", "sending", "idle"].map((k) => `${time(l[k])} <span class="soft">${percent(l[k], data.total)}</span>`)]))}`
    + (data.lanes.length > 1 ? `<p><small>Two lanes or more compute during <b>${percent(data.overlap, 1)}</b> of the time in which any does.</small></p>` : ""), two);
  section(`<h2>Largest things to fix</h2><ol>${data.fixes.map((fix) => `<li>${escape(fix)}</li>`).join("")}</ol>`, two);
  const levels = section(`<h2>Levels</h2><p class="soft"><small>Operations alone, eager mode. Floor: ${si(data.floor.flops_per_s, "FLOP/s")} and ${si(data.floor.bytes_per_s, "B/s")}, a product and a copy measured on ${escape(data.floor.of)}.</small></p>`
    + table(["level", "operations", "time", "FLOP/s", "bytes/s", "floor", "of the floor"], data.levels.map((l) =>
      [l.level, l.names.map((n) => `<span class="name">${escape(n)}</span>`).join(", "), time(l.seconds), si(l.flops / l.seconds, "FLOP/s"), si(l.bytes / l.seconds, "B/s"), time(l.floor),
        `<span class="meter"><i style="width:${percent(l.floor, l.seconds)}"></i></span>${percent(l.floor, l.seconds)}`])));
  levels.classList.add("levels");
  section(`<h2>Clocks</h2><p class="soft"><small>${data.clocks.map((c, i) => `lane ${i}: ${time(Math.abs(c.offset))} ${c.offset < 0 ? "behind" : "ahead"}, to within ${time(c.uncertainty)}${c.shared ? ", one clock with the coordinator: 0 applied" : ", applied"}`).join("; ")}.</small></p>`);
}

main();
