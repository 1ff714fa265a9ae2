// The page's charts, each drawn anew on its canvas from all its data.
const style = getComputedStyle(document.documentElement);
const colour = (name) => style.getPropertyValue(`--${name}`).trim();
const LEFT = 76, BOTTOM = 24, TOP = 8, RIGHT = 8; // pixels, for the axes' words

export function drawRounds(canvas, ended, going, elapsed) {
  const { pen, width, height } = begin(canvas);
  const rounds = going ? [...ended, going] : ended;
  const end = Math.max(elapsed, ...rounds.map(([at, duration]) => at + duration), 0.001);
  const rate = ([, duration, bytes]) => bytes / Math.max(duration, 1e-6);
  const most = Math.max(...rounds.map(rate), 1);
  const x = scale(0, end, LEFT, width - RIGHT), y = scale(0, most, height - BOTTOM, TOP);
  axes(pen, width, height, x, end, y, most, perSecond);
  const pattern = hatching(pen);
  for (const round of rounds) {
    const [at, duration, , written, final] = round;
    const left = x(at), wide = Math.max(x(at + duration) - left, 1);
    pen.globalAlpha = round === going ? 0.5 : 1;
    pen.fillStyle = colour(final ? "dirty" : "sent");
    pen.fillRect(left, y(rate(round)), wide, y(0) - y(rate(round)));
    const top = y(Math.min(written / Math.max(duration, 1e-6), most));
    pen.globalAlpha = 1;
    pen.fillStyle = pattern;
    pen.fillRect(left, top, wide, y(0) - top);
    pen.strokeStyle = "#fff";
    pen.strokeRect(left, y(rate(round)), wide, y(0) - y(rate(round)));
  }
}

export function drawRates(canvas, samples, stalls, migration) {
  const { pen, width, height } = begin(canvas);
  const end = Math.max(migration.elapsed, 0.001);
  const most = Math.max(...samples.map(([, rate, dirty]) => Math.max(rate, dirty)), 1);
  const x = scale(0, end, LEFT, width - RIGHT), y = scale(0, most, height - BOTTOM, TOP);
  const share = scale(0, Math.max(migration.memory, 1), height - BOTTOM, TOP);
  pen.fillStyle = colour("stall");
  for (const [at, duration] of stalls) {
    pen.fillRect(x(at), TOP, Math.max(x(at + duration) - x(at), 1), height - BOTTOM - TOP);
  }
  axes(pen, width, height, x, end, y, most, perSecond);
  line(pen, samples.map(([at, , , pending]) => [x(at), share(pending)]), "pending", 2);
  const known = samples.filter(([, , dirty]) => dirty !== null);
  line(pen, known.map(([at, , dirty]) => [x(at), y(dirty)]), "dirty", 3);
  line(pen, samples.map(([at, rate]) => [x(at), y(rate)]), "sent", 3);
}

export function drawMaps(canvas, maps) {
  const { pen, width, height } = begin(canvas);
  if (!maps.length) return;
  const high = (height - BOTTOM - TOP) / Math.max(maps.length, 4);
  const often = Math.max(2, ...maps.map(([, , sent]) => Math.max(...sent)));
  maps.forEach(([round, pending, sent], index) => {
    const top = TOP + index * high, wide = (width - LEFT - RIGHT) / sent.length;
    sent.forEach((times, block) => {
      const left = LEFT + block * wide;
      const grey = 245 - Math.round(190 * Math.min(Math.log1p(times) / Math.log1p(often), 1));
      pen.fillStyle = `rgb(${grey} ${grey} ${grey})`;
      pen.fillRect(left, top, wide + 0.5, high + 0.5);
      if (pending[block]) {
        pen.globalAlpha = 0.25 + 0.0075 * pending[block];
        pen.fillStyle = colour("dirty");
        pen.fillRect(left, top, wide + 0.5, high + 0.5);
        pen.globalAlpha = 1;
      }
    });
    if (high >= 14 || index % Math.ceil(14 / high) === 0) {
      words(pen, `round ${round}`, LEFT - 6, top + Math.min(high / 2 + 5, high), "right");
    }
  });
  words(pen, "first page", LEFT, height - 6, "left");
  words(pen, "last page", width - RIGHT, height - 6, "right");
}

export function drawParts(canvas, parts) {
  const { pen, width, height } = begin(canvas);
  const total = parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) return;
  const colours = ["sent", "dirty", "pending", "stall", "faint"];
  let left = 0, shown = 0;
  parts.forEach(([name, seconds, text], index) => {
    const wide = (seconds / total) * width;
    pen.fillStyle = colour(colours[index % colours.length]);
    pen.fillRect(left, 0, Math.max(wide - 1, 0), height / 3);
    if (seconds >= total / 20) { // the words of the others would lie upon each other
      words(pen, `${name} ${text}`, Math.min(left, width - 150), height / 3 + 20 + 20 * (shown % 2), "left");
      shown += 1;
    }
    left += wide;
  });
}

export function drawTurns(canvas, turns, bound) {
  const { pen, width, height } = begin(canvas);
  const x = (seconds) => scale(-5, 1, LEFT, width - RIGHT)(Math.log10(Math.max(seconds, 1e-5)));
  const most = Math.max(...turns.map(([, count]) => count), 1);
  const y = scale(0, Math.log1p(most), height - BOTTOM, TOP);
  pen.fillStyle = colour("sent");
  for (const [upper, count] of turns) {
    const left = x(upper / 1.09);
    pen.fillRect(left, y(Math.log1p(count)), Math.max(x(upper) - left - 1, 2), y(0) - y(Math.log1p(count)));
  }
  pen.fillStyle = colour("dirty");
  pen.fillRect(x(bound), TOP, 2, height - BOTTOM - TOP);
  for (const [seconds, text] of [[1e-5, "10 us"], [1e-4, "100 us"], [1e-3, "1 ms"], [1e-2, "10 ms"], [0.1, "100 ms"], [1, "1 s"]]) {
    words(pen, text, x(seconds), height - 6, "center");
  }
  words(pen, String(most), LEFT - 6, TOP + 12, "right");
  rule(pen, LEFT, height - BOTTOM, width - RIGHT, height - BOTTOM);
}

function begin(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "14px system-ui, sans-serif";
  return { pen, width, height };
}

function scale(from, to, low, high) {
  return (value) => low + ((value - from) / (to - from)) * (high - low);
}

function axes(pen, width, height, x, end, y, most, write) {
  const step = nice(end / 8);
  for (let at = 0; at <= end; at += step) {
    words(pen, `${Number(at.toFixed(3))} s`, Math.min(x(at), width - RIGHT - 16), height - 6, "center");
  }
  const rows = nice(most / 4);
  for (let value = 0; value <= most; value += rows) {
    words(pen, write(value), LEFT - 6, y(value) + 5, "right");
    rule(pen, LEFT, y(value), width - RIGHT, y(value));
  }
}

function nice(raw) {
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
}

function perSecond(value) {
  for (const [unit, size] of [["GB/s", 1e9], ["MB/s", 1e6], ["kB/s", 1e3]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return value ? `${Math.round(value)} B/s` : "0";
}

function words(pen, text, x, y, align) {
  pen.fillStyle = colour("ink");
  pen.textAlign = align;
  pen.fillText(text, x, y);
}

function rule(pen, x1, y1, x2, y2) {
  pen.strokeStyle = colour("line");
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
}

function line(pen, points, name, wide) {
  pen.strokeStyle = colour(name);
  pen.lineWidth = wide;
  pen.beginPath();
  points.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
}

function hatching(pen) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const inside = tile.getContext("2d");
  inside.strokeStyle = "#000";
  inside.beginPath();
  inside.moveTo(0, 8);
  inside.lineTo(8, 0);
  inside.stroke();
  return pen.createPattern(tile, "repeat");
}
