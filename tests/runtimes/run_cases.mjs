// Run networks in onnxruntime-node or onnxruntime-web: `node run_cases.mjs RUNTIME < cases.json > outputs.json`, in the
// folder where the runtime is installed. A case is a file, inputs by name and the names of the outputs; a tensor is its
// dtype, its shape and its values, flat.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
const runtime = process.argv[2];
const ort = createRequire(resolve("package.json"))(runtime);
const web = runtime === "onnxruntime-web";
if (web) ort.env.wasm.numThreads = 1;
const options = { executionProviders: [web ? "wasm" : "cpu"], intraOpNumThreads: 1 };

const sessions = {};
const answers = [];
for (const { file, inputs, outputs } of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    sessions[file] ??= await ort.InferenceSession.create(readFileSync(file), options);
    const given = {};
    for (const [name, { dtype, shape, values }] of Object.entries(inputs)) {
      given[name] = new ort.Tensor(dtype, ARRAYS[dtype].from(dtype === "int64" ? values.map(BigInt) : values), shape);
    }
    const found = await sessions[file].run(given);
    const tensor = ({ type, dims, data }) => ({ dtype: type, shape: dims, values: Array.from(data, Number) });
    answers.push(Object.fromEntries(outputs.map((name) => [name, tensor(found[name])])));
  } catch (error) {
    answers.push({ error: String(error) });
  }
}
process.stdout.write(JSON.stringify(answers));
