// The one definition of noise, as redif_sdk/sampling/noise.py has it: (seed, image index, slot) -> standard normal numbers.
//
// Philox4x32-10 for the words, Box-Muller in doubles by + - * / and sqrt in a stated order, rounded to float32: every
// operation here is exactly rounded and none is fused, so the numbers are Python's, bit for bit. A test compares them.

const MULTIPLIER_0 = 0xd2511f53;
const MULTIPLIER_1 = 0xcd9e8d57;
const WEYL_0 = 0x9e3779b9;
const WEYL_1 = 0xbb67ae85;
const ROUNDS = 10;

const SQRT_HALF = Math.SQRT1_2;
const LN2 = Math.LN2;
const RADIANS = (2 * Math.PI) / 4294967296;

// Highest power first, as Horner's rule takes them; each is one correctly rounded division.
const ATANH = Array.from({ length: 11 }, (_, i) => 1 / (21 - 2 * i));
const SIN = Array.from({ length: 9 }, (_, i) => signedInverseFactorial(17 - 2 * i));
const COS = Array.from({ length: 9 }, (_, i) => signedInverseFactorial(16 - 2 * i));

/** The seeds and indices that there are: whole numbers below 2^64, as BigInt. */
export const SEED_LIMIT = 1n << 64n;

/**
 * The first `count` normal numbers of (seed, index, slot), Float32Array. `seed` and `index` are BigInt below 2^64,
 * `slot` a number below 2^32.
 */
export function normals(seed, index, slot, count) {
  const keyLow = Number(seed & 0xffffffffn);
  const keyHigh = Number(seed >> 32n);
  const indexLow = Number(index & 0xffffffffn);
  const indexHigh = Number(index >> 32n);
  const numbers = new Float32Array(Math.ceil(count / 4) * 4);
  const words = new Uint32Array(4);
  for (let block = 0; block * 4 < numbers.length; block += 1) {
    philox(block, slot, indexLow, indexHigh, keyLow, keyHigh, words);
    boxMuller(words[0], words[1], numbers, block * 4);
    boxMuller(words[2], words[3], numbers, block * 4 + 2);
  }
  return numbers.subarray(0, count);
}

/** Ten rounds on the counter (c0, c1, c2, c3) with the key (k0, k1), into `words`. */
function philox(c0, c1, c2, c3, k0, k1, words) {
  for (let round = 0; round < ROUNDS; round += 1) {
    const high0 = multiplyHigh(MULTIPLIER_0, c0);
    const high1 = multiplyHigh(MULTIPLIER_1, c2);
    const low0 = Math.imul(MULTIPLIER_0, c0) >>> 0;
    const low1 = Math.imul(MULTIPLIER_1, c2) >>> 0;
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0;
    k0 = (k0 + WEYL_0) >>> 0;
    k1 = (k1 + WEYL_1) >>> 0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/** The upper 32 bits of the product of two words, by halves of 16 bits. */
function multiplyHigh(a, b) {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const low = aLow * bLow;
  const middle = aHigh * bLow + Math.floor(low / 65536); // below 2^32
  const other = aLow * bHigh + (middle % 65536);
  return (aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0;
}

function boxMuller(u, v, numbers, at) {
  const radius = Math.sqrt(-2 * logUniform(u));
  const turned = (v + 0x20000000) >>> 0; // modulo 2^32: a whole turn is none
  const quarter = turned >>> 30;
  const angle = ((turned & 0x3fffffff) - 0x20000000) * RADIANS;
  const square = angle * angle;
  const cosine = horner(COS, square);
  const sine = angle * horner(SIN, square);
  const odd = (quarter & 1) === 1;
  const horizontal = odd ? sine : cosine;
  const vertical = odd ? cosine : sine;
  numbers[at] = radius * (quarter === 1 || quarter === 2 ? -horizontal : horizontal);
  numbers[at + 1] = radius * (quarter >= 2 ? -vertical : vertical);
}

/** ln((word + 1/2) / 2^32): word + 1/2 = m 2^e with m in [sqrt(1/2), sqrt(2)), and ln m = 2 atanh((m - 1) / (m + 1)). */
function logUniform(word) {
  let exponent = 32 - Math.clz32(word);
  let mantissa = (word + 0.5) / 2 ** exponent; // in [1/2, 1), exactly
  if (mantissa < SQRT_HALF) {
    mantissa += mantissa;
    exponent -= 1;
  }
  const z = (mantissa - 1) / (mantissa + 1);
  return (exponent - 32) * LN2 + (z + z) * horner(ATANH, z * z);
}

function horner(coefficients, x) {
  let total = coefficients[0];
  for (let i = 1; i < coefficients.length; i += 1) {
    total = total * x + coefficients[i];
  }
  return total;
}

function signedInverseFactorial(n) {
  let factorial = 1;
  for (let i = 2; i <= n; i += 1) {
    factorial *= i;
  }
  return (Math.floor(n / 2) % 2 === 0 ? 1 : -1) / factorial;
}
