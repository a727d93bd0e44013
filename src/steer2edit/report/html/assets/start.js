"use strict";
// Starts each section that has data.

startTheme();
const answers = DATA.answers ? new Answers(DATA.answers, DATA.trade_off) : null;
const showAnswers = (id) => answers && answers.show(id);
if (DATA.trade_off) startTradeOff(DATA.trade_off, showAnswers);
if (DATA.map) startMaps(DATA.map);
if (DATA.scores) startSpreads(DATA.scores);
const started = answers ? answers.start() : Promise.resolve();
started.then(() => document.documentElement.setAttribute("data-ready", ""));
