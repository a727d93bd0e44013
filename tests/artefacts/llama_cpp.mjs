// Greedy answers by llama.cpp: a job as JSON on stdin, the token ids of each answer as JSON on stdout.
// The job: folder (which holds node_modules), model, lora (or null), ids (the prompts), n (tokens at most), stops.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import fs from "node:fs";

const job = JSON.parse(fs.readFileSync(0, "utf8"));
const place = createRequire(job.folder + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(place).href);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error"});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({
    contextSize: 512,
    sequences: 1,
    threads: 1, // several wait for each other in a spin, for minutes where the cores are shared
    flashAttention: false,
    experimentalKvCacheKeyType: "F32", // the default rounds keys and values to 16 bits
    experimentalKvCacheValueType: "F32",
    lora: job.lora ?? undefined
});
const sequence = context.getSequence();
const answers = [];
for (const ids of job.ids) {
    await sequence.clearHistory();
    const answer = [];
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        if (job.stops.includes(token)) break;
        answer.push(token);
        if (answer.length === job.n) break;
    }
    answers.push(answer);
}
fs.writeSync(1, JSON.stringify(answers) + "\n");
process.exit(0); // llama.cpp's threads would keep it alive
