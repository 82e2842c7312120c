// The page "Servers": asks for the numbers once a second and shows them; it computes no statistics of its own.

import { Chart, clock, element, highest } from "./chart.js";

const HISTORY_SECONDS = 120, PERCENTILES = ["p50", "p95", "p99"];
const find = (id) => document.getElementById(id);
const color = (place) => `s${place % 6}`;

const round = (value) => value.toLocaleString("en", { maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2 });
const milliseconds = (seconds) => round(seconds * 1000);

const one = (read, of = "") => (points, target, place) =>
  [{ name: of, values: points.map((p) => (p.targets[target] ? read(p.targets[target]) : null)), style: "l0", color: color(place) }];
const times = (metric) => (points, target, place) => PERCENTILES.map((name, i) => ({
  name, style: `l${i}`, color: color(place), values: points.map((p) => p.targets[target]?.times[metric]?.[i] ?? null) }));

function failures(points, target) {
  const kinds = [...new Set(points.flatMap((p) => Object.keys(p.targets[target]?.failed_per_second ?? {})))].sort();
  return kinds.map((name, i) => ({ name, style: "l0", color: color(4 + i),
    values: points.map((p) => (p.targets[target] ? p.targets[target].failed_per_second[name] ?? 0 : null)) }));
}

const NO_SCHEDULE = "Only an open loop has a schedule";
const QUANTITIES = [
  { title: "Output throughput", unit: "tokens/s", format: round, lines: one((t) => t.output_tokens_per_second) },
  { title: "Requests that succeeded", unit: "requests/s", format: round, lines: one((t) => t.requests_per_second) },
  { title: "Time to first token (TTFT)", unit: "ms", format: milliseconds, lines: times("ttft") },
  { title: "Time per output token (TPOT)", unit: "ms", format: milliseconds, lines: times("tpot") },
  { title: "End-to-end latency (E2E)", unit: "ms", format: milliseconds, lines: times("e2e") },
  { title: "Response time, from the schedule", unit: "ms", format: milliseconds, lines: times("response_time"), empty: NO_SCHEDULE },
  { title: "Send lateness", unit: "ms", format: milliseconds, lines: times("send_lateness"), empty: NO_SCHEDULE },
  { title: "Requests in flight", unit: "requests", format: round, lines: one((t) => t.in_flight) },
  { title: "Requests that failed", unit: "requests/s", format: round, lines: failures, empty: "None has failed" },
];

const page = { points: [], started: null, targets: [], charts: new Map(), pointed: null, latest: null };

function point(second) {
  if (second === page.pointed) return;
  page.pointed = second;
  drawCharts();
}

function chart(key, title, holder) {
  if (!page.charts.has(key)) {
    page.charts.set(key, new Chart(title, point));
    holder().append(page.charts.get(key).figure);
  }
  return page.charts.get(key);
}

/** Put headings and room for each server's charts on the page, when the servers are known or others. */
function layOut(targets) {
  if (targets.join() === page.targets.join()) return;
  page.targets = targets;
  page.charts.clear();
  find("charts").replaceChildren(...QUANTITIES.map(({ title, unit }, i) =>
    element("section", { class: "quantity", "aria-labelledby": `q${i}` },
      element("h3", { id: `q${i}` }, title, " ", element("small", {}, unit)), element("div", { class: "panels", id: `panels${i}` }))));
  find("cpu").replaceChildren();
}

function drawCharts() {
  const { points } = page;
  if (!points.length) return;
  const last = Math.max(points.at(-1).second, 30);
  const seconds = points.map((p) => p.second);
  // The scale grows with the test until it is as long as what is kept.
  const shared = { seconds, last, first: Math.max(0, last - HISTORY_SECONDS + 1), pointed: page.pointed };
  QUANTITIES.forEach((quantity, i) => {
    const all = page.targets.map((target, place) => quantity.lines(points, target, place));
    const top = highest(all.flat()) * 1.05;
    page.targets.forEach((name, place) => {
      chart(`${i} ${name}`, quantity.title, () => find(`panels${i}`)).show({ ...shared, name, color: color(place), lines: all[place],
        top: find("same-scale").checked ? top : highest(all[place]) * 1.05, unit: quantity.unit, format: quantity.format,
        empty: quantity.empty ?? "Nothing to show yet" });
    });
  });
  drawCpu(shared);
}

function drawCpu(shared) {
  const names = [...new Set(page.points.flatMap((p) => Object.keys(p.cpu_shares)))].sort();
  if (!names.length) return;
  const lines = names.map((name, i) => ({ name, style: "l0", color: color(i + 2),
    values: page.points.map((p) => (p.cpu_shares[name] === undefined ? null : p.cpu_shares[name] * 100)) }));
  chart("cpu", "CPU of the load generator", () => find("cpu"))
    .show({ ...shared, lines, top: Math.max(100, highest(lines)), unit: "", format: (value) => `${round(value)} %`, name: "", color: "", empty: "" });
}

const cells = (tag, values, attributes = {}) => values.map((value) => element(tag, attributes, value));
const row = (name, values) => element("tr", {}, element("th", { scope: "row" }, name), ...cells("td", values, { class: "n" }));
const three = (values) => (values ? values.map(milliseconds).join(" / ") : "-");

function failed(outcomes) {
  const kinds = Object.entries(outcomes).filter(([kind]) => kind !== "ok");
  if (!kinds.length) return "0";
  const text = kinds.map(([kind, count]) => `${round(count)} ${kind}`).join(", ");
  return element("span", { class: "bad-text" }, text);
}

function drawRun(run) {
  const each = Object.values(run);
  find("run").tHead.replaceChildren(element("tr", {}, element("td"), ...page.targets.map((name, i) =>
    element("th", { scope: "col", class: `n ${color(i)}` }, name))));
  const rows = [
    ["Succeeded", each.map((t) => round(t.outcomes.ok ?? 0))], ["Failed", each.map((t) => failed(t.outcomes))],
    ["In flight", each.map((t) => round(t.in_flight))],
    ["Output tokens", each.map((t) => round(t.output_tokens))], ["Prompt tokens", each.map((t) => round(t.prompt_tokens))],
    ["Measured requests", each.map((t) => round(t.measured))],
    ...[["ttft", "TTFT"], ["tpot", "TPOT"], ["e2e", "E2E"], ["response_time", "Response time"], ["send_lateness", "Send lateness"]]
      .filter(([metric]) => each.some((t) => t.times[metric])).map(([metric, name]) => [name, each.map((t) => three(t.times[metric]))]),
  ];
  find("run").tBodies[0].replaceChildren(...rows.map(([name, values]) => row(name, values)));
}

function drawClients(clients) {
  find("clients").tBodies[0].replaceChildren(...Object.entries(clients).map(([name, c]) => row(name, [
    `${round(c.cpu_share * 100)} %`, `${milliseconds(c.lag_p99_seconds)} ms`,
    c.send_lateness_p99_seconds === null ? "-" : `${milliseconds(c.send_lateness_p99_seconds)} ms`])));
  find("clients").hidden = !Object.keys(clients).length;
  find("no-clients").hidden = !find("clients").hidden;
}

function say(id, text) {
  // Written only when it changes, so that a screen reader says it once.
  if (find(id).textContent !== text) find(id).textContent = text;
}

function note(text, bad = false) {
  say("note-text", text);
  find("note-link").hidden = bad;
  find("note").hidden = !text;
  find("note").classList.toggle("bad", bad);
}

function drawNote(got) {
  const known = page.targets.length > 0;
  if (!got.running && !known) note("No test is running. Start one on the first page, then come back here.");
  else if (!got.running) note("The test has ended; these are its last numbers. The next one starts on the first page.");
  else if (!known) note("The test has started. Numbers come with its first request.");
  else note("");
}

function drawJudgement(judgement) {
  find("judgement").hidden = !judgement;
  if (!judgement) return;
  const whole = judgement.complete ? "" : " It was ended before all was sent and answered.";
  say("verdict", (judgement.valid ? "The load generator finds its test valid." : "The load generator finds its test not valid:") + whole);
  find("judgement").classList.toggle("bad", !judgement.valid);
  find("reasons").replaceChildren(...judgement.reasons.map((reason) => Object.assign(document.createElement("li"), { textContent: reason })));
}

function take(got) {
  if (got.started !== page.started) Object.assign(page, { points: [], started: got.started, pointed: null });
  // Two answers may hold the same points: one was asked for when the page came back into view.
  const last = page.points.at(-1)?.second ?? -1;
  page.points = [...page.points, ...got.points.filter((p) => p.second > last)].slice(-HISTORY_SECONDS);
  layOut(Object.keys(got.run));
  const users = got.running ? `, ${round(got.users)} ${got.users === 1 ? "user" : "users"}` : "";
  const time = page.points.length ? `, ${clock(page.points.at(-1).second)}` : "";
  find("state").textContent = got.running ? `Running${users}${time}` : "Not running";
  drawNote(got);
  drawJudgement(got.judgement);
  say("window", String(got.window_seconds));
  find("records").hidden = !got.records;
  find("numbers").hidden = !page.targets.length;
  drawRun(got.run);
  drawClients(got.clients);
  drawCharts();
}

async function poll() {
  // A page that nobody sees asks nothing: the load generator has better uses for its time.
  if (document.hidden) return;
  const since = page.points.at(-1)?.second ?? -1;
  try {
    let response = await fetch(`./servers.json?since=${since}`, { signal: AbortSignal.timeout(5000) });
    if (!response.ok || response.redirected) throw new Error(`HTTP ${response.status}`);
    let got = await response.json();
    if (got.started !== page.started && since >= 0) got = await (await fetch("./servers.json")).json();
    take(got);
  } catch (error) {
    note(`Locust does not answer (${error.message}). Trying again.`, true);
  }
}

async function run() {
  for (;;) {
    await poll();
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

find("same-scale").addEventListener("change", drawCharts);
document.addEventListener("visibilitychange", poll);
run();
