// One small line chart in SVG: lines over seconds, from zero up, with what they are named and worth in its caption.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 20;

export function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const clock = (second) => `${Math.floor(second / 60)}:${String(second % 60).padStart(2, "0")}`;

/** A round step that divides `highest` into about `parts`. */
function roundStep(highest, parts) {
  const raw = highest / parts, power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw);
}

export const highest = (lines) => Math.max(0, ...lines.flatMap((line) => line.values.filter((value) => value !== null)));

export class Chart {
  /** `onPoint(second or null)` is called when the reader points at a moment. */
  constructor(title, onPoint) {
    this.title = title;
    this.caption = element("figcaption");
    this.svg = element("svg:svg", { role: "img" });
    this.figure = element("figure", {}, this.caption, this.svg);
    this.svg.addEventListener("pointermove", (event) => onPoint(this.secondAt(event)));
    this.svg.addEventListener("pointerleave", () => onPoint(null));
    new ResizeObserver(() => this.data && this.draw()).observe(this.svg);
  }

  /** Show `lines` ({name, values, style, color}) over `seconds`; `top` is the least height of the scale. */
  show(data) {
    this.data = data;
    this.draw();
  }

  secondAt(event) {
    if (!this.data?.seconds.length) return null;
    const share = (event.clientX - this.svg.getBoundingClientRect().left - LEFT) / (this.width - LEFT - RIGHT);
    const { first, last, seconds } = this.data;
    const second = Math.round(first + share * (last - first));
    return Math.min(Math.max(second, seconds[0]), seconds.at(-1));
  }

  draw() {
    const { lines, seconds, first, last, top, format, empty, pointed } = this.data;
    this.width = this.svg.clientWidth || 300;
    this.height = this.svg.clientHeight || 150;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    const step = roundStep(top || 1, 4), ceiling = step * Math.ceil((top || 1) / step - 1e-9);
    const x = (second) => LEFT + ((second - first) / (last - first)) * (this.width - LEFT - RIGHT);
    const y = (value) => this.height - BOTTOM - (value / ceiling) * (this.height - TOP - BOTTOM);
    const drawn = [...this.grid(x, y, step, ceiling)];
    if (pointed !== null) {
      drawn.push(element("svg:line", { class: "cursor", x1: x(pointed), x2: x(pointed), y1: TOP, y2: y(0) }));
      const end = x(pointed) > this.width - 40;
      drawn.push(element("svg:text", { class: "moment", x: x(pointed) + (end ? -4 : 4), y: TOP + 8, "text-anchor": end ? "end" : "start" }, clock(pointed)));
    }
    const any = lines.some((line) => line.values.some((value) => value !== null));
    if (any) for (const line of lines) drawn.push(path(line, seconds, x, y));
    else drawn.push(element("svg:text", { class: "empty", x: (LEFT + this.width) / 2, y: y(ceiling / 2), "text-anchor": "middle" }, empty));
    this.svg.replaceChildren(...drawn);
    this.write(lines, pointed === null ? seconds.length - 1 : seconds.indexOf(pointed), format, any ? "" : empty);
  }

  *grid(x, y, step, ceiling) {
    const { first, last, format } = this.data;
    for (let value = 0; value <= ceiling + step / 2; value += step) {
      yield element("svg:line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y(value), y2: y(value) });
      yield element("svg:text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value));
    }
    for (let second = Math.ceil(first / 30) * 30; second <= last; second += 30) {
      if (second < 0) continue;
      const anchor = x(second) > this.width - 24 ? "end" : "middle";
      yield element("svg:text", { x: x(second), y: this.height - 5, "text-anchor": anchor }, clock(second));
    }
  }

  write(lines, place, format, empty) {
    const { name, color, unit } = this.data;
    const said = lines.map((line) => [line, line.values[place] ?? null]);
    const keys = said.map(([line, value]) => element("span", { class: "key" }, swatch(line),
      line.name ? `${line.name} ` : "", element("b", {}, value === null ? "-" : format(value))));
    this.caption.replaceChildren(...(name ? [element("span", { class: `name ${color}` }, name)] : []), ...(empty ? [] : keys));
    const values = said.map(([line, value]) => `${line.name} ${value === null ? "none" : `${format(value)} ${unit}`}`.trim());
    this.svg.setAttribute("aria-label", `${[this.title, name].filter(Boolean).join(", ")}: ${empty || values.join(", ")}`);
  }
}

function path({ values, style, color }, seconds, x, y) {
  let d = "";
  values.forEach((value, i) => {
    // A lone value is a line of no length, which its round ends make a dot.
    if (value !== null) d += (i && values[i - 1] !== null ? "L" : "M") + `${x(seconds[i]).toFixed(1)} ${y(value).toFixed(1)}h0`;
  });
  return element("svg:path", { d, class: `${style} ${color}` });
}

function swatch({ style, color }) {
  return element("svg:svg", { class: "swatch", viewBox: "0 0 22 8", "aria-hidden": "true" },
    element("svg:path", { d: "M1 4H21", class: `${style} ${color}` }));
}
