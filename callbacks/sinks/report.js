// The chart of a report: values and verdicts under the pointer, and zoom. It replaces the picture, which stays for
// viewers without scripts and for print. All text from the run is set as text, never as markup.
"use strict";
(() => {
  const figure = document.getElementById("figure");
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const { steps, panels, stages, verdicts } = data;
  const chart = figure.querySelector(".chart");
  const tip = figure.querySelector(".tip");
  const NS = "http://www.w3.org/2000/svg";
  const GAP = 14, BOTTOM = 34, ROW = 9, LABEL = 16, NARROW = 520;

  const first = steps.find((s) => s > 0) ?? 1;
  const last = Math.max(steps[steps.length - 1], first);
  const zero = Math.log10(first) - Math.max(0.15 * Math.log10(last / first), 0.3);
  const along = (step) => (step > 0 ? Math.max(Math.log10(step), zero) : zero); // step 0 left of the first after it
  const xs = steps.map(along);
  const margin = 0.02 * (xs[xs.length - 1] - xs[0]) || 0.2;
  const whole = [xs[0] - margin, xs[xs.length - 1] + margin];
  let view = whole.slice();
  let chosen = -1;
  let geometry = null;

  const node = (name, attributes, parent, text) => {
    const made = document.createElementNS(NS, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  };
  const spaced = (digits) => digits.replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
  const integer = (value) => spaced(String(value));
  const number = (value) => {
    if (value === null) return "–";
    const text = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 0.1) ? value.toPrecision(3) : value.toFixed(3);
    return text.replace("-", "−");
  };
  const measured = (value, error) => {
    if (value === null) return "–";
    const scale = error > 0 ? error : Math.abs(value) / 100;
    const decimals = scale > 0 ? Math.min(Math.max(1, -Math.floor(Math.log10(scale))), 6) : 1;
    return value.toFixed(decimals).replace("-", "−") + (error === null ? "" : " ± " + error.toFixed(decimals));
  };
  const short = (step) => {
    for (const [unit, suffix] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (step >= unit) return +(step / unit).toPrecision(6) + suffix;
    return String(+step.toPrecision(6));
  };

  // At most `most` round numbers from low to high.
  const ticks = (low, high, most) => {
    const raw = (high - low) / most || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? 10 * power;
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + 1e-9 * step && found.length < 20; at += step) found.push(+at.toPrecision(12));
    return found;
  };
  const stepTicks = (width) => {
    const most = Math.max(2, Math.floor(width / 62));
    const low = 10 ** Math.max(view[0], Math.log10(first)), high = 10 ** view[1];
    const zeroTick = steps[0] <= 0 && zero >= view[0] ? [0] : [];
    let found = [];
    for (const multiples of [[1], [1, 3], [1, 2, 5]]) {
      found = [];
      for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++)
        for (const m of multiples) if (m * 10 ** k >= low && m * 10 ** k <= high) found.push(m * 10 ** k);
      if (found.length >= 3) break;
    }
    if (found.length < 3) found = ticks(low, high, Math.min(most, 4)).filter(Number.isInteger);
    return zeroTick.concat(found.filter((_, i) => i % Math.ceil(found.length / most) === 0));
  };

  // Rows for the bars, so that neighbours whose intervals meet don't lie on each other.
  const rows = [];
  const reach = [];
  for (const stage of stages) {
    const from = along(Math.min(stage.start, stage.startInterval[0])), to = along(Math.max(stage.end, stage.endInterval[1]));
    let row = reach.findIndex((end) => from > end + 0.01 * (whole[1] - whole[0]));
    if (row < 0) row = reach.length < 3 ? reach.length : reach.indexOf(Math.min(...reach));
    reach[row] = to;
    rows.push(row);
  }

  const draw = () => {
    const width = chart.clientWidth, narrow = width < NARROW;
    const left = narrow ? 44 : 62, right = 10, top = LABEL + ROW * Math.max(1, reach.length) + 6;
    const heights = panels.map((_, i) => (i === 0 ? (narrow ? 190 : 250) : narrow ? 110 : 130));
    const height = top + heights.reduce((a, b) => a + b + GAP + (narrow ? 12 : 0), 0) + BOTTOM;
    chart.replaceChildren();
    const svg = node("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, chart);
    const inner = width - left - right;
    const x = (at) => left + (inner * (at - view[0])) / (view[1] - view[0]);
    const clipped = (step) => Math.min(Math.max(x(along(step)), left), left + inner);
    const defs = node("defs", {}, svg);
    const clip = node("clipPath", { id: "inner" }, defs);
    node("rect", { x: left, y: 0, width: inner, height }, clip);

    stages.forEach((stage, i) => {
      const a = clipped(stage.start), b = clipped(stage.end), y = LABEL + 5 + ROW * rows[i];
      for (const interval of [stage.startInterval, stage.endInterval]) {
        const p = clipped(interval[0]), q = clipped(interval[1]);
        if (q > p) node("rect", { x: p, y: y - 3.5, width: q - p, height: 7, rx: 1, class: "interval" }, svg);
      }
      if (b > a) node("rect", { x: a, y: y - 1.5, width: b - a, height: 3, class: `bar ${stage.look}` }, svg);
      if (b - a > 12) node("text", { x: (a + b) / 2, y: 12, class: `letter ${stage.look}` }, svg, stage.label);
    });

    let y0 = top;
    const drawn = panels.map((panel, i) => {
      const h = heights[i];
      if (narrow) y0 += 12;
      const from = y0, y1 = y0 + h;
      for (const stage of stages) {
        const a = clipped(stage.start), b = clipped(stage.end);
        if (b <= a) continue;
        node("rect", { x: a, y: from, width: b - a, height: h, class: `stage ${stage.look}${stage.provisional ? " provisional" : ""}` }, svg);
        for (const edge of [a, b]) if (edge > left && edge < left + inner) node("line", { x1: edge, x2: edge, y1: from, y2: y1, class: "edge" }, svg);
      }
      let low = Infinity, high = -Infinity;
      xs.forEach((at, k) => {
        if (at < view[0] || at > view[1] || panel.values[k] === null) return;
        const e = panel.errors && panel.errors[k] !== null && !data.doubtful[k] ? 2 * panel.errors[k] : 0;
        low = Math.min(low, panel.values[k] - e);
        high = Math.max(high, panel.values[k] + e);
      });
      if (low > high) [low, high] = [0, 1];
      const pad = 0.06 * (high - low) || Math.abs(high) * 0.05 || 0.5;
      low -= pad; high += pad;
      const y = (value) => Math.min(Math.max(y1 - (h * (value - low)) / (high - low), from - 50), y1 + 50);
      for (const tick of ticks(low, high, h > 150 ? 5 : 3)) {
        node("line", { x1: left, x2: left + inner, y1: y(tick), y2: y(tick), class: "grid" }, svg);
        node("text", { x: left - 6, y: y(tick) + 4, class: "tick y" }, svg, short2(tick));
      }
      const panelClip = node("clipPath", { id: `clip${i}` }, defs);
      node("rect", { x: left, y: from, width: inner, height: h }, panelClip);
      const group = node("g", { "clip-path": `url(#clip${i})` }, svg);
      if (panel.errors) {
        let band = "";
        const flush = (run) => {
          if (run.length < 2) return;
          band += "M" + run.map((k) => `${x(xs[k]).toFixed(1)} ${y(panel.values[k] + 2 * panel.errors[k]).toFixed(1)}`).join("L");
          band += "L" + run.slice().reverse().map((k) => `${x(xs[k]).toFixed(1)} ${y(panel.values[k] - 2 * panel.errors[k]).toFixed(1)}`).join("L") + "Z";
        };
        let run = [];
        xs.forEach((_, k) => {
          if (panel.values[k] === null || panel.errors[k] === null) { flush(run); run = []; } else run.push(k);
        });
        flush(run);
        node("path", { d: band, class: "band" }, group);
      }
      let path = "", pen = "M";
      xs.forEach((at, k) => {
        if (panel.values[k] === null) return;
        path += `${pen}${x(at).toFixed(1)} ${y(panel.values[k]).toFixed(1)}`;
        pen = "L";
      });
      node("path", { d: path, class: "curve" }, group);
      const inView = xs.filter((at) => at >= view[0] && at <= view[1]).length;
      xs.forEach((at, k) => {
        if (at < view[0] || at > view[1]) return;
        const doubt = i === data.llc && data.doubtful[k];
        if (i === data.llc && data.failed[k]) node("text", { x: x(at), y: y1 - 3, class: "failed" }, svg, "×");
        else if (panel.values[k] !== null && (doubt || inView <= 60))
          node("circle", { cx: x(at), cy: y(panel.values[k]), r: doubt ? 3.2 : 2, class: doubt ? "doubtful" : "point" }, group);
      });
      node("line", { x1: left, x2: left + inner, y1: y1, y2: y1, class: "axis" }, svg);
      node("line", { x1: left, x2: left, y1: from, y2: y1, class: "axis" }, svg);
      if (narrow) node("text", { x: left, y: from - 4, class: "name" }, svg, panel.name);
      else node("text", { x: 12, y: (from + y1) / 2, class: "name y", transform: `rotate(-90 12 ${(from + y1) / 2})` }, svg, panel.name.length > 18 ? panel.name.slice(0, 17) + "…" : panel.name);
      y0 = y1 + GAP;
      return y;
    });
    const bottom = y0 - GAP;
    for (const tick of stepTicks(inner)) {
      const at = x(along(tick));
      node("line", { x1: at, x2: at, y1: bottom, y2: bottom + 4, class: "axis" }, svg);
      node("text", { x: at, y: bottom + 16, class: "tick" }, svg, short(tick));
    }
    node("text", { x: left + inner / 2, y: bottom + 31, class: "name x" }, svg, "training step");
    geometry = { x, left, inner, top, bottom, drawn, svg, marks: node("g", {}, svg) };
    mark();
  };
  const short2 = (value) => (Math.abs(value) >= 1000 ? (value < 0 ? "−" : "") + short(Math.abs(value)) : String(value).replace("-", "−"));

  // The line and the dots at the chosen point, and the box with its values.
  const mark = () => {
    const { x, left, inner, top, bottom, drawn, marks } = geometry;
    marks.replaceChildren();
    if (chosen < 0 || xs[chosen] < view[0] || xs[chosen] > view[1]) { tip.hidden = true; return; }
    const at = x(xs[chosen]);
    node("line", { x1: at, x2: at, y1: top, y2: bottom, class: "cross" }, marks);
    panels.forEach((panel, i) => {
      if (panel.values[chosen] !== null) node("circle", { cx: at, cy: drawn[i](panel.values[chosen]), r: 3.5, class: "chosen" }, marks);
    });
    tip.replaceChildren();
    const line = (name, value, look) => {
      const row = document.createElement("div");
      for (const [tag, text] of [["span", name], ["b", value]]) {
        const cell = document.createElement(tag);
        cell.textContent = text;
        row.appendChild(cell);
      }
      if (look) row.className = look;
      tip.appendChild(row);
    };
    line("step", integer(steps[chosen]));
    panels.forEach((panel) => line(panel.name.length > 24 ? panel.name.slice(0, 23) + "…" : panel.name,
      panel.errors ? measured(panel.values[chosen], panel.errors[chosen]) : number(panel.values[chosen])));
    if (verdicts) line("verdict", verdicts[data.verdict[chosen]], data.failed[chosen] ? "fail" : data.doubtful[chosen] ? "doubt" : "");
    const stage = stages.find((s) => s.start <= steps[chosen] && steps[chosen] <= s.end);
    if (stage) line("transition", `${stage.label}, ${integer(stage.start)} → ${integer(stage.end)}`, "wide");
    tip.hidden = false;
    tip.classList.toggle("below", chart.clientWidth < NARROW);
    const space = figure.clientWidth - tip.offsetWidth - 8;
    const beside = at > left + inner / 2 ? at - tip.offsetWidth - 14 : at + 14;
    tip.style.left = `${Math.max(8, Math.min(chart.offsetLeft + beside, space))}px`;
    tip.style.top = `${chart.offsetTop + top + 6}px`;
  };

  const stepAt = (event) => {
    const { left, inner } = geometry;
    const share = (event.clientX - chart.getBoundingClientRect().left - left) / inner;
    return view[0] + Math.min(Math.max(share, 0), 1) * (view[1] - view[0]);
  };
  const nearest = (at) => {
    let best = -1;
    xs.forEach((value, k) => {
      if (value >= view[0] && value <= view[1] && (best < 0 || Math.abs(value - at) < Math.abs(xs[best] - at))) best = k;
    });
    return best;
  };
  const zoom = (low, high) => {
    const span = Math.min(Math.max(high - low, 1e-3 * (whole[1] - whole[0])), whole[1] - whole[0]);
    low = Math.min(Math.max((low + high - span) / 2, whole[0]), whole[1] - span);
    view = [low, low + span];
    draw();
  };
  const zoomBy = (factor, at) => zoom(at - (at - view[0]) * factor, at + (view[1] - at) * factor);

  const pointers = new Map();
  let dragged = null, pinched = null;
  chart.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, event);
    if (event.pointerType === "mouse" && event.button === 0) {
      dragged = { from: stepAt(event), clientX: event.clientX };
      chart.setPointerCapture(event.pointerId);
    } else if (pointers.size === 2) {
      const [a, b] = [...pointers.values()].map(stepAt);
      pinched = { a: Math.min(a, b), b: Math.max(a, b) };
    }
    chosen = nearest(stepAt(event));
    mark();
  });
  chart.addEventListener("pointermove", (event) => {
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, event);
    if (pinched && pointers.size === 2) {
      const { left, inner } = geometry, box = chart.getBoundingClientRect().left + left;
      const [p, q] = [...pointers.values()].map((e) => (e.clientX - box) / inner).sort((a, b) => a - b);
      if (q - p > 0.05) {
        const span = (pinched.b - pinched.a) / (q - p);
        zoom(pinched.a - p * span, pinched.a - p * span + span);
      }
      return;
    }
    chosen = nearest(stepAt(event));
    mark();
    if (dragged && Math.abs(event.clientX - dragged.clientX) > 4) {
      const { x, top, bottom, marks } = geometry, [a, b] = [x(dragged.from), x(stepAt(event))];
      node("rect", { x: Math.min(a, b), y: top, width: Math.abs(b - a), height: bottom - top, class: "selection" }, marks);
    }
  });
  const released = (event) => {
    pointers.delete(event.pointerId);
    if (pointers.size < 2) pinched = null;
    if (dragged && event.type === "pointerup" && Math.abs(event.clientX - dragged.clientX) > 4) {
      const to = stepAt(event);
      const from = dragged.from;
      dragged = null;
      zoom(Math.min(from, to), Math.max(from, to));
    }
    dragged = null;
  };
  chart.addEventListener("pointerup", released);
  chart.addEventListener("pointercancel", released);
  chart.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !dragged) { chosen = -1; mark(); }
  });
  document.addEventListener("pointerdown", (event) => {
    if (!figure.contains(event.target)) { chosen = -1; mark(); }
  });
  chart.addEventListener("dblclick", () => zoom(...whole));
  chart.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // a plain wheel scrolls the page
    event.preventDefault();
    zoomBy(Math.exp(event.deltaY / 300), stepAt(event));
  }, { passive: false });
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      const next = chosen < 0 ? nearest((view[0] + view[1]) / 2) : chosen + move;
      chosen = Math.min(Math.max(next, 0), xs.length - 1);
      if (xs[chosen] < view[0] || xs[chosen] > view[1]) zoom(xs[chosen] - (view[1] - view[0]) / 2, xs[chosen] + (view[1] - view[0]) / 2);
      mark();
    } else if (event.key === "+" || event.key === "=") zoomBy(0.6, chosen < 0 ? (view[0] + view[1]) / 2 : xs[chosen]);
    else if (event.key === "-") zoomBy(1 / 0.6, (view[0] + view[1]) / 2);
    else if (event.key === "0" || event.key === "Escape") zoom(...whole);
    else return;
    event.preventDefault();
  });
  for (const button of figure.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const centre = chosen < 0 ? (view[0] + view[1]) / 2 : xs[chosen];
      if (button.value === "all") zoom(...whole);
      else zoomBy(button.value === "in" ? 0.6 : 1 / 0.6, centre);
    });

  figure.classList.add("live");
  try {
    draw();
    new ResizeObserver(() => { if (geometry && chart.clientWidth !== Number(geometry.svg.getAttribute("width"))) draw(); }).observe(chart);
  } catch (error) {
    figure.classList.remove("live");
    throw error;
  }
})();
