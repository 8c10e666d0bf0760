// Check a policy, then decide for two devices; golden rows stand for what the models compute.
//
//     npm install --ignore-scripts onnxruntime-node
//     node node.mjs onnxruntime-node exported/forecast

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { Policy, costCurves } from "./policy.mjs";

const [runtime, folder] = process.argv.slice(2);
const ort = createRequire(resolve("package.json"))(runtime); // from where it is installed: the working directory
const web = runtime === "onnxruntime-web";
if (web) ort.env.wasm.numThreads = 1;
const policy = await Policy.load(ort, (file) => readFile(join(folder, file)), {
  executionProviders: [web ? "wasm" : "cpu"],
  intraOpNumThreads: 1, // the networks are small: more threads only make them slower
});
await policy.check();
console.log(`${policy.description.name}: every golden row agrees`);

const sizes = policy.description.block_sizes;
const drafted = sizes.filter((size) => size > 1);
const positions = Array.from({ length: Math.max(...sizes) }, (_, i) => i + 1);
const devices = { "wide passes are cheap": 0.0001, "wide passes are dear": 0.004 };
for (const [device, slope] of Object.entries(devices)) {
  console.log(`where ${device}:`);
  for (const [method, { golden }] of Object.entries(policy.networks)) {
    const draft = drafted.map((size) => 0.002 + 0.0001 * size);
    const verify = positions.map((width) => 0.02 + slope * width);
    const curves = costCurves(sizes, draft, verify, 0.001, Object.values(golden.inputs)[0].length);
    const state = {}; // one for each batch of requests, from begin to end
    console.log(`  ${method}:`, await policy.decide(method, { ...golden.inputs, ...curves }, state));
  }
}
