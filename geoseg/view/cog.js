// A mask's COG, as geoseg writes them, by range requests: its directories first, then a block at a time, as class codes.
// One uint8 band in tiles, DEFLATE or not compressed, little-endian, classic or BigTIFF; each level has every second pixel of the
// one before. Anything else throws, and the page has the mask drawn by the server instead.
"use strict";

class Cog {
  static #PAGE = 64 << 10;
  static #KEPT = 96; // decoded blocks, 256 KiB each
  #url;
  #size = 0;
  #pages = new Map();
  #blocks = new Map();

  constructor(url) {
    this.#url = url;
    this.levels = [];
  }

  static async open(url) {
    const cog = new Cog(url);
    await cog.#readDirectories();
    return cog;
  }

  // The codes of a block, row by row; null where the file has none, which is no data.
  async block(level, col, row, signal) {
    const { across, down, offsets, counts, side } = this.levels[level];
    if (col < 0 || row < 0 || col >= across || row >= down) return null;
    const key = `${level}/${col}/${row}`;
    const kept = this.#blocks.get(key);
    if (kept !== undefined) return kept;
    const at = row * across + col;
    const [start, count] = [await this.#element(offsets, at), await this.#element(counts, at)];
    let codes = null;
    if (count > 0) {
      const body = await this.#fetch(start, start + count, signal);
      codes = this.levels[level].isDeflated ? await inflate(body) : body;
      if (codes.length !== side * side) throw new Error("a block of the mask is damaged");
    }
    this.#blocks.set(key, codes);
    if (this.#blocks.size > Cog.#KEPT) this.#blocks.delete(this.#blocks.keys().next().value);
    return codes;
  }

  async #readDirectories() {
    const head = await this.#bytes(0, 16);
    const kind = head.getUint16(2, true);
    if (head.getUint16(0, true) !== 0x4949 || (kind !== 42 && kind !== 43)) throw new Error("the mask is no TIFF that this page reads");
    const big = kind === 43;
    let at = big ? Number(head.getBigUint64(8, true)) : head.getUint32(4, true);
    const [number, entry] = big ? [8, 20] : [2, 12];
    while (at && this.levels.length < 32) {
      const first = await this.#bytes(at, at + number);
      const num = big ? Number(first.getBigUint64(0, true)) : first.getUint16(0, true);
      if (num > 1000) throw new Error("the mask's directory is damaged");
      const table = await this.#bytes(at + number, at + number + num * entry + (big ? 8 : 4));
      const fields = new Map();
      for (let place = 0; place < num; place += 1) {
        const from = place * entry;
        const count = big ? Number(table.getBigUint64(from + 4, true)) : table.getUint32(from + 4, true);
        const type = table.getUint16(from + 2, true);
        const size = { 1: 1, 3: 2, 4: 4, 16: 8 }[type] ?? 0;
        const inline = at + number + from + (big ? 12 : 8);
        const room = big ? 8 : 4;
        const stored = big ? Number(table.getBigUint64(from + 12, true)) : table.getUint32(from + 8, true);
        fields.set(table.getUint16(from, true), { size, count, at: size * count <= room ? inline : stored });
      }
      this.levels.push(await this.#level(fields));
      at = big ? Number(table.getBigUint64(num * entry, true)) : table.getUint32(num * entry, true);
    }
    const [{ width, height }] = this.levels;
    const isHalved = this.levels.every((one, level) => one.width === Math.ceil(width / 2 ** level) && one.height === Math.ceil(height / 2 ** level));
    if (!isHalved) throw new Error("the mask's overviews are not halves of each other");
  }

  async #level(fields) {
    const value = async (tag, missing) => (fields.has(tag) ? this.#element(fields.get(tag), 0) : missing);
    const [width, height, side, tall] = [await value(256), await value(257), await value(322), await value(323)];
    const [bits, compression, samples, predictor] = [await value(258, 1), await value(259, 1), await value(277, 1), await value(317, 1)];
    const isOurs = bits === 8 && samples === 1 && predictor === 1 && side === tall && side > 0 && side <= 1024;
    if (!isOurs || ![1, 8, 32946].includes(compression)) throw new Error("the mask is not stored as geoseg stores masks");
    const [across, down] = [Math.ceil(width / side), Math.ceil(height / side)];
    const [offsets, counts] = [fields.get(324), fields.get(325)];
    if (offsets?.count !== across * down || counts?.count !== across * down) throw new Error("the mask's table of blocks is damaged");
    return { width, height, side, across, down, offsets, counts, isDeflated: compression !== 1 };
  }

  async #element({ at, size }, place) {
    const view = await this.#bytes(at + place * size, at + (place + 1) * size);
    if (size === 8) return Number(view.getBigUint64(0, true));
    return size === 4 ? view.getUint32(0, true) : size === 2 ? view.getUint16(0, true) : view.getUint8(0);
  }

  // Bytes of the header, from pages that are kept.
  async #bytes(start, end) {
    const whole = new Uint8Array(end - start);
    for (let page = Math.floor(start / Cog.#PAGE); page * Cog.#PAGE < end; page += 1) {
      const first = page * Cog.#PAGE;
      if (!this.#pages.has(page)) {
        const last = this.#size ? Math.min(this.#size, first + Cog.#PAGE) : first + Cog.#PAGE;
        const coming = this.#fetch(first, last);
        coming.catch(() => this.#pages.delete(page));
        this.#pages.set(page, coming);
      }
      const body = await this.#pages.get(page);
      const [from, to] = [Math.max(start, first), Math.min(end, first + Cog.#PAGE)];
      if (first + body.length < to) throw new Error("the mask is cut short");
      whole.set(body.subarray(from - first, to - first), from - start);
    }
    return new DataView(whole.buffer);
  }

  async #fetch(start, end, signal) {
    const answer = await fetch(this.#url, { headers: { Range: `bytes=${start}-${end - 1}` }, signal });
    if (answer.status !== 206) throw new Error((await answer.json().catch(() => null))?.sentence ?? "the mask cannot be read");
    this.#size = Number(answer.headers.get("Content-Range").split("/")[1]);
    const body = new Uint8Array(await answer.arrayBuffer());
    if (body.length !== Math.min(end, this.#size) - start) throw new Error("the mask came cut short");
    return body;
  }
}

async function inflate(body) {
  const stream = new Blob([body]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
