// An exported policy in JavaScript. `ort` is onnxruntime-node, or onnxruntime-web in a browser.

const DECIDES = { begin: "block_size", select: "block_size", extend: "go_on", truncate: "verify_length" };
const ARRAYS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };

/** The networks of a folder, by when they are asked: begin, select, extend, truncate. */
export class Policy {
  /** `read` gives the bytes of a file of the folder: Uint8Array. */
  static async load(ort, read, options = {}) {
    const policy = new Policy();
    policy.ort = ort;
    policy.description = JSON.parse(new TextDecoder().decode(await read("policy.json")));
    policy.networks = {};
    for (const [file, network] of Object.entries(policy.description.networks)) {
      const data = await read(file);
      const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
      if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== network.sha256) {
        throw new Error(`${file} is not the file that policy.json describes`);
      }
      const session = await ort.InferenceSession.create(data, options);
      policy.networks[network.method] = { ...network, session };
    }
    return policy;
  }

  /** An input from nested lists, or from a tensor as it is. */
  tensor({ dtype }, values) {
    if (values instanceof this.ort.Tensor) return values;
    const shape = [];
    for (let list = values; Array.isArray(list); list = list[0]) shape.push(list.length);
    const flat = values.flat(Infinity);
    // int64 are BigInts in JavaScript.
    return new this.ort.Tensor(dtype, ARRAYS[dtype].from(dtype === "int64" ? flat.map(BigInt) : flat), shape);
  }

  /** All outputs of a network by name, as tensors; what it does not take is ignored. */
  async ask(method, given) {
    const { inputs, session } = this.networks[method];
    return session.run(Object.fromEntries(inputs.map((input) => [input.name, this.tensor(input, given[input.name])])));
  }

  /**
   * A decision for each row, and what to remember of the requests in `state`; null if a score is not finite.
   *
   * After null draft `default_block_size`, go on drafting, or verify the whole draft: the text is the same.
   */
  async decide(method, given, state) {
    const outputs = await this.ask(method, { ...given, ...state });
    for (const { type, data } of Object.values(outputs)) {
      if (type === "float32" && !data.every(Number.isFinite)) return null;
    }
    for (const [name, value] of Object.entries(outputs)) {
      const kept = name.replace(/^next_/, "");
      if (this.description.state.includes(kept)) state[kept] = value;
    }
    return Array.from(outputs[DECIDES[method]].data, Number);
  }

  /** Try the rows that came with the files; throws where a runtime gets other numbers. */
  async check() {
    for (const [method, { golden, tolerance }] of Object.entries(this.networks)) {
      const outputs = await this.ask(method, golden.inputs);
      for (const [name, rows] of Object.entries(golden.outputs)) {
        const { type, data } = outputs[name];
        const expected = rows.flat(Infinity).map(Number);
        const allowed = type === "float32" ? tolerance : 0;
        const agree = data.length === expected.length;
        if (!agree || !expected.every((value, i) => Math.abs(Number(data[i]) - value) <= allowed)) {
          throw new Error(`${method}: ${name} is ${data}, expected ${expected}`);
        }
      }
    }
  }
}

/**
 * The `_seconds` inputs of a device, here the same at every context length.
 *
 * `draft`: seconds of drafting each block size above 1; `verify`: of a target pass over 1, 2, ... positions, up to the
 * largest block size; `rest`: of everything else in a step.
 */
export function costCurves(blockSizes, draft, verify, rest, rows) {
  const sizes = blockSizes.filter((size) => size > 1);
  const steps = [verify[0] + rest, ...sizes.map((size, i) => draft[i] + verify[size - 1] + rest)];
  return {
    step_seconds: Array(rows).fill(steps),
    verify_seconds: Array(rows).fill(verify),
    typical_step_seconds: steps,
  };
}
