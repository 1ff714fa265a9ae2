// Shows what the stream of server-sent events says. Text from outside is only ever set as text.
import { drawMaps, drawParts, drawRates, drawRounds, drawTurns } from "./charts.js";

const LISTS = ["samples", "rounds", "maps", "stalls", "happenings"];
const MOST = { samples: 1200, rounds: 200, maps: 200, stalls: 200, happenings: 200 };
const element = (id) => document.getElementById(id);

let now = null;
const known = Object.fromEntries(LISTS.map((name) => [name, []]));
let drawing = false;

const source = new EventSource("events");
source.onopen = () => { element("link").textContent = ""; };
source.onerror = () => {
  element("link").textContent =
    source.readyState === EventSource.CLOSED ? "not let in" : "kvmmig watch does not answer; what is shown is old";
};
source.onmessage = (event) => {
  const message = JSON.parse(event.data);
  now = message.now;
  for (const name of LISTS) {
    if (message.kind === "whole") known[name] = message[name];
    else for (const row of message[name] ?? []) add(name, row);
  }
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(draw);
  }
};
addEventListener("resize", () => now && draw());

function add(name, row) {
  const rows = known[name];
  if (name === "maps") {
    const same = rows.findLastIndex((each) => each[0] === row[0]);
    if (same >= 0) { rows[same] = row; return; }
  }
  rows.push(row);
  if (rows.length > MOST[name]) rows.shift();
}

function draw() {
  drawing = false;
  const migration = now.migration;
  document.title = `${now.machine}: ${migration ? migration.words : now.state}`;
  element("machine").textContent = now.machine;
  element("state").textContent = now.state;
  element("about").textContent = now.about;
  element("none").hidden = migration !== null;
  element("migration").hidden = migration === null;
  if (migration === null) return;
  element("migration").classList.toggle("stopped", migration.stopped);
  element("words").textContent = migration.words;
  element("peer").textContent = migration.peer && `to ${migration.peer}`;
  element("done").value = migration.done;
  fill(element("said"), said(migration), (text) => make("li", text));
  fill(element("figures"), migration.figures, ([name, value]) => {
    const pair = document.createElement("div");
    pair.append(make("dt", name), make("dd", value));
    return pair;
  });
  const figures = Object.fromEntries(migration.figures);
  element("downtime").textContent = migration.stopped ? "the guest stands still" : figures.downtime;
  fill(element("happenings"), known.happenings.toSorted((one, other) => other[0] - one[0]), ([at, text]) => {
    const item = document.createElement("li");
    item.append(make("span", `${at.toFixed(3)} s`), text);
    return item;
  });
  drawRounds(element("rounds"), known.rounds, migration.going, migration.elapsed);
  drawRates(element("rates"), known.samples, known.stalls, migration);
  drawMaps(element("maps"), known.maps);
  drawParts(element("parts"), migration.parts);
  drawTurns(element("turns"), migration.turns, migration.bound);
}

function said(migration) {
  const lines = [...migration.notices];
  if (migration.error) lines.push(migration.error);
  if (now.gone && !migration.ended) lines.push("The machine has ended, and how its migration ended was not seen.");
  return lines;
}

function make(kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}

function fill(parent, items, makeOne) {
  parent.replaceChildren(...items.map(makeOne));
}
